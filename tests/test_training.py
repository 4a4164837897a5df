"""Training: bitwise equal to a loop written by hand, and to an uninterrupted run when killed and resumed; errors."""

import errno
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pytest
import torch
from helpers import Moments, assert_same, ended_by, in_new_process
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyrovae import VAE, History, fit
from pyrovae.data import dynamic_binarization
from pyrovae.encoders import DiagonalNormal
from pyrovae.inference.running import evaluation_mode
from pyrovae.likelihoods import Bernoulli, Normal, OptimalNormal
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal
from pyrovae.storage import read_checkpoint, save
from pyrovae.training import MetricsFile, checkpoints, loop

train = partial(fit, progress=False)
SMALL = partial(MLP, hidden=(8,))
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def normal_vae(context_dim: int = 0) -> VAE:
    """A VAE for four real pixels."""
    return VAE(
        StandardNormal(2),
        Normal(2, 4, SMALL, context_dim=context_dim),
        DiagonalNormal(4, 2, SMALL, context_dim=context_dim),
    )


def stateful_vae(width: int = 8) -> VAE:
    """A VAE for 16 binary pixels with batch normalisation, whose state is in buffers, and dropout."""
    encoder = nn.Sequential(
        nn.Linear(16, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 4)
    )
    return VAE(StandardNormal(2), Bernoulli(2, 16, SMALL), DiagonalNormal(16, 2, encoder))


class Pair(NamedTuple):
    """A Pyro model and guide."""

    model: Callable
    guide: Callable


def regression(**start: float) -> Pair:
    """y ~ Normal(weight x + bias, 1) without latents: the results of training are known exactly.

    The loss per datum is (y - weight x - bias)^2 / 2 + log(2 pi) / 2.
    """

    def model(x, y):
        weight = pyro.param("weight", torch.tensor(start.get("weight", 0.0)))
        bias = pyro.param("bias", torch.tensor(start["bias"])) if "bias" in start else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(weight * x + bias, 1.0), obs=y)

    return Pair(model, lambda x, y: None)


def stored() -> dict[str, Tensor]:
    """Returns copies of all parameters that Pyro knows, without the number in the name of a VAE."""
    named = pyro.get_param_store().named_parameters()
    return {re.sub(r"^vae\d+", "vae", name): p.detach().clone() for name, p in named}


def without_seconds(history: History) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history.records]


# A loop written by hand, which fit must equal.


class Shuffled:
    """Batches in an order drawn from torch's random state in every pass."""

    def __init__(self, *tensors: Tensor, batch_size: int = 16, transform: Callable = lambda *batch: batch):
        self.tensors, self.batch_size, self.transform = tensors, batch_size, transform

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in torch.randperm(len(self.tensors[0])).split(self.batch_size):
            yield self.transform(*(t[rows] for t in self.tensors))


def by_hand(model, guide, batches, epochs=3, loss=None, size=None) -> list[float]:
    """Trains without fit, by Pyro's own loss_and_grads and Adam; returns the loss of each epoch.

    Like fit it takes a look at one batch first, which draws an order, and runs the loss once for the parameters to be
    made. Batches are of 16, a power of two, so that it makes no difference to the bit whether a loss or its gradient
    is divided by it.
    """
    loss = loss or Trace_ELBO()
    first = next(iter(batches))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        loss.loss(model, guide, *first)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    optimizer = Adam(parameters, lr=1e-3, fused=True)  # like fit's; the loop over parameters rounds otherwise
    losses = []
    for _ in range(epochs):
        total = count = 0
        for batch in batches:
            optimizer.zero_grad()
            value = loss.loss_and_grads(model, guide, *batch)
            for p in parameters:
                if p.grad is not None:
                    p.grad /= size or len(batch[0])
            optimizer.step()
            total, count = total + (value[0] if isinstance(value, tuple) else value), count + (size or len(batch[0]))
        losses.append(total / count)
    return losses


def trained(run: Callable[[Callable, Callable], Any], make: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """Makes and trains a model and guide, from the same random state each time; returns the parameters and more."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    pair = make()
    pyro.set_rng_seed(2)
    returned = run(pair.model, pair.guide)
    return stored(), returned


def assert_as_by_hand(make, data, batches, loss=Trace_ELBO, size=None, **options) -> History:
    """Asserts that fit leaves the same parameters, to the bit, as the loop by hand."""
    options = {"batch_size": 16, "epochs": 3} | options
    fitted, history = trained(lambda m, g: train(m, g, data(), loss=loss(), **options), make)
    written, losses = trained(lambda m, g: by_hand(m, g, batches(), loss=loss(), size=size), make)
    assert_same(fitted, written)
    # Pyro sums losses in double or in single precision: 1e-6 is eight units of the latter.
    assert history["loss"] == pytest.approx(losses, rel=1e-6)
    assert history["epoch"] == [1, 2, 3]
    return history


def closures() -> Pair:
    """A hand-written VAE: plain networks and pyro.module."""
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Pair(model, guide)


def bare_parameters() -> Pair:
    """No network: pyro.param alone, one of them constrained, so that Pyro keeps another tensor than the model sees."""
    start = torch.randn(2, 4)

    def model(x):
        weight = pyro.param("weight", start)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", lambda: torch.zeros(4, 2))
        scale = pyro.param("posterior scale", torch.ones(2), constraint=constraints.softplus_positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, scale).to_event(1))

    return Pair(model, guide)


class Model(PyroModule):
    """A PyroModule with a plain network, a PyroParam and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.offset = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + self.offset, self.scale).to_event(1), obs=x)


class Guide(PyroModule):
    """A PyroModule with a PyroModule inside."""

    def __init__(self):
        super().__init__()
        self.encoder = PyroModule[nn.Sequential](PyroModule[nn.Linear](4, 8), nn.Tanh(), PyroModule[nn.Linear](8, 2))
        self.posterior_scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.posterior_scale).to_event(1))


def automatic(auto: type) -> Pair:
    """A latent that all data share, and Pyro's automatic guide, which makes its parameters when it first runs."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(4), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return Pair(model, auto(model))


PAIRS = {
    "VAE": normal_vae,
    "closures": closures,
    "pyro.param": bare_parameters,
    "PyroModule": lambda: Pair(Model(), Guide()),
    "AutoNormal": lambda: automatic(AutoNormal),
    "AutoDiagonalNormal": lambda: automatic(AutoDiagonalNormal),
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_fit_is_the_loop_one_would_write(make):
    x = torch.randn(64, 4)
    assert_as_by_hand(make, lambda: x, lambda: Shuffled(x))


LOSSES = {
    "Trace_ELBO, 4 particles": partial(Trace_ELBO, num_particles=4, vectorize_particles=True),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": partial(RenyiELBO, alpha=0.0, num_particles=4, vectorize_particles=True),
    "ReweightedWakeSleep": partial(ReweightedWakeSleep, num_particles=4, vectorize_particles=True),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_fit_takes_any_elbo(loss):
    x = torch.randn(64, 4)
    assert_as_by_hand(normal_vae, lambda: x, lambda: Shuffled(x), loss)


def mixture() -> Pair:
    """A mixture of two components. Pyro sums over the component, so the guide has no site."""

    def model(x):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    return Pair(model, lambda x: None)


def test_fit_enumerates():
    x = torch.randn(64)
    assert_as_by_hand(mixture, lambda: x, lambda: Shuffled(x), partial(TraceEnum_ELBO, max_plate_nesting=1))


def test_the_loss_of_an_enumerated_model_is_its_log_likelihood():
    x = torch.randn(64)
    pair = mixture()
    history = train(
        *pair, x, loss=TraceEnum_ELBO(max_plate_nesting=1), optimizer=partial(SGD, lr=0.0), epochs=1, batch_size=16
    )
    components = torch.stack([dist.Normal(loc, 1.0).log_prob(x.double()) for loc in (-1.0, 1.0)])
    exact = -(components.logsumexp(0) - math.log(2)).mean().item()
    # Single precision: a sum of 64 terms is off by no more than 64 units of 1.2e-7.
    assert history["loss"] == pytest.approx([exact], rel=64 * 1.2e-7)


# Data.


class Rows(Dataset):
    """Data that comes one by one, 70 rows so that batches of 16 do not divide it."""

    def __init__(self, size: int = 70):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(64).x)


class Wrapped:
    """A loader whose batches are tuples of arguments."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return ((x,) for x in self.loader)


FORMS = {"tuple": lambda x: (x,), "list": lambda x: [x], "TensorDataset": TensorDataset}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_data_make_no_difference(form):
    x = torch.randn(50, 4)
    one, _ = trained(lambda m, g: train(m, g, x, epochs=2, batch_size=20), normal_vae)
    other, _ = trained(lambda m, g: train(m, g, form(x), epochs=2, batch_size=20), normal_vae)
    assert_same(one, other)


def test_tuples_become_arguments():
    x, labels = torch.randn(64, 4), torch.eye(3)[torch.arange(64) % 3]
    make = partial(normal_vae, context_dim=3)
    assert_as_by_hand(make, lambda: (x, labels), lambda: Shuffled(x, labels))
    assert_as_by_hand(make, lambda: TensorDataset(x, labels), lambda: Shuffled(x, labels))
    loader = partial(DataLoader, TensorDataset(x, labels), 16, shuffle=True)
    assert_as_by_hand(make, loader, loader)


LOADERS = {
    "shuffled": partial(DataLoader, Rows(64), 16, shuffle=True),
    "in order": partial(DataLoader, Rows(64), 16),
    "own generator": lambda: DataLoader(Rows(64), 16, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "drop_last": partial(DataLoader, Rows(70), 16, shuffle=True, drop_last=True),
    "stream": lambda: DataLoader(Stream(), 16),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_loaders_have_the_say_over_batches(loader):
    # The batch size of fit is ignored.
    assert_as_by_hand(normal_vae, loader, lambda: Wrapped(loader()), batch_size=128)


def test_data_sets_are_put_in_loaders():
    assert_as_by_hand(normal_vae, lambda: Rows(64), lambda: Wrapped(DataLoader(Rows(64), 16, shuffle=True)))
    assert_as_by_hand(normal_vae, Stream, lambda: Wrapped(DataLoader(Stream(), 16)))


def test_every_datum_counts_the_same():
    """The last batch is smaller: its loss weighs less in the epoch's, and its gradient is per datum all the same."""
    x = torch.randn(70)
    y = torch.randn(70)
    history = train(*regression(), (x, y), optimizer=partial(SGD, lr=0.0), epochs=1, batch_size=32)
    # Single precision: a sum of 70 terms is off by no more than 70 units of 1.2e-7.
    assert history["loss"] == pytest.approx([(y.double() ** 2).mean().item() / 2 + HALF_LOG_2_PI], rel=70 * 1.2e-7)
    pyro.clear_param_store()
    train(*regression(), DataLoader(TensorDataset(x, y), 64), optimizer=partial(SGD, lr=1.0), epochs=1)
    weight = 0.0
    for rows in (slice(0, 64), slice(64, 70)):
        weight += ((y[rows].double() - weight * x[rows].double()) * x[rows].double()).mean().item()
    assert pyro.param("weight").item() == pytest.approx(weight, rel=70 * 1.2e-7, abs=70 * 1.2e-7)


def test_subsampled_plates_make_no_difference_to_the_loss_per_datum():
    """A plate that says that 16 data stand for 64 has a loss four times as large, for four times the data."""
    x = torch.randn(64, 4)
    validation = torch.randn(32, 4)

    def subsampled() -> Pair:
        vae = normal_vae()

        def model(x):
            pyro.module(vae.name, vae)
            with pyro.plate("data", 64, subsample=x):
                z = pyro.sample("z", vae.prior())
                pyro.sample("x", vae.likelihood(z), obs=x)

        def guide(x):
            pyro.module(vae.name, vae)
            with pyro.plate("data", 64, subsample=x):
                pyro.sample("z", vae.encoder(x))

        return Pair(model, guide)

    plain, history = trained(lambda m, g: train(m, g, x, epochs=3, batch_size=16, validation=validation), normal_vae)
    scaled, scaled_history = trained(
        lambda m, g: train(m, g, x, epochs=3, batch_size=16, validation=validation), subsampled
    )
    assert_same(plain, scaled)
    for name in ("loss", "validation"):
        assert scaled_history[name] == pytest.approx(history[name], rel=1e-6)  # single precision, some units of 1.2e-7
    assert_as_by_hand(subsampled, lambda: x, lambda: Shuffled(x), size=64)


def test_a_model_that_subsamples_by_itself():
    """The plate draws 5 of a batch; the loss stands for all of the batch, also for the last, smaller one."""
    x = torch.ones(70)

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    history = train(model, lambda x: None, x, optimizer=partial(SGD, lr=0.0), epochs=1, batch_size=40)
    # All data are equal, so any five of them give the loss per datum: up to rounding to single precision.
    assert history["loss"] == pytest.approx([0.5 + HALF_LOG_2_PI], rel=1e-6)


def test_transforms_apply_to_every_batch():
    grey = torch.rand(64, 16)
    make = lambda: VAE(StandardNormal(2), Bernoulli(2, 16, SMALL), DiagonalNormal(16, 2, SMALL))  # noqa: E731
    assert_as_by_hand(
        make, lambda: grey, lambda: Shuffled(grey, transform=dynamic_binarization), transform=dynamic_binarization
    )


def test_transforms_see_all_arguments():
    grey, labels = torch.rand(64, 16), torch.eye(3)[torch.arange(64) % 3]

    def make() -> VAE:
        return VAE(
            StandardNormal(2), Bernoulli(2, 16, SMALL, context_dim=3), DiagonalNormal(16, 2, SMALL, context_dim=3)
        )

    assert_as_by_hand(
        make,
        lambda: (grey, labels),
        lambda: Shuffled(grey, labels, transform=dynamic_binarization),
        transform=dynamic_binarization,
    )


# Optimizers and schedules.


def test_optimizer_objects_are_like_what_makes_them():
    x = torch.randn(50, 4)

    def run(make_optimizer: Callable) -> dict[str, Tensor]:
        def go(vae: VAE) -> None:
            train(vae.model, vae.guide, x, epochs=2, batch_size=20, optimizer=make_optimizer(vae))

        pyro.set_rng_seed(1)
        vae = normal_vae()
        go(vae)
        return dict(vae.state_dict())

    called = run(lambda vae: partial(SGD, lr=0.1, momentum=0.9))
    assert_same(called, run(lambda vae: SGD(vae.parameters(), lr=0.1, momentum=0.9)))
    groups = [("prior", "likelihood"), ("encoder",)]
    assert_same(
        called,
        run(
            lambda vae: SGD(
                [{"params": [p for n in names for p in getattr(vae, n).parameters()]} for names in groups],
                lr=0.1,
                momentum=0.9,
            )
        ),
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("optimizer", lambda: pyro.optim.Adam({"lr": 1e-3})),
        ("optimizer", lambda: "Adam"),
        ("optimizer", lambda: lambda params: None),
        ("optimizer", lambda: torch.optim.LBFGS),
        ("scheduler", lambda: StepLR(SGD([torch.zeros(1)]), 2)),
        ("callbacks", lambda: print),
        ("callbacks", lambda: [3]),
    ],
)
def test_what_is_no_optimizer_schedule_or_callback_is_named(name, make):
    vae = normal_vae()
    with pytest.raises(TypeError, match=f"{name} must (be|make)"):
        train(vae.model, vae.guide, torch.randn(20, 4), batch_size=10, **{name: make()})


def test_optimizers_must_hold_all_parameters():
    vae = normal_vae()
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    optimizer = Adam(vae.encoder.parameters())
    with pytest.raises(
        ValueError, match=r"optimizer does not hold 5 of 9 parameters.*likelihood.*requires_grad_\(False\)"
    ):
        train(vae.model, vae.guide, torch.randn(20, 4), batch_size=10, optimizer=optimizer)
    assert_same(dict(vae.state_dict()), before)
    vae.likelihood.requires_grad_(False)  # as the message says
    train(vae.model, vae.guide, torch.randn(20, 4), batch_size=10, epochs=1, optimizer=optimizer)


def test_frozen_parameters_stay_and_the_others_move():
    vae = normal_vae()
    vae.encoder.network.layers[0].requires_grad_(False)
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    train(vae.model, vae.guide, torch.randn(50, 4), batch_size=10, epochs=2)
    stayed = {name for name, p in vae.state_dict().items() if p.equal(before[name])}
    assert stayed == {"encoder.network.layers.0.weight", "encoder.network.layers.0.bias"}


@pytest.mark.parametrize("clip_norm, norm", [(0.5, 0.5), (100.0, math.hypot(28.0, 10.0))])
def test_the_gradient_is_clipped_over_all_parameters_together(clip_norm, norm):
    """Of (y - w x - b)^2 / 2 at x = 2.8, y = 10 and w = b = 0 the gradient is (-28, -10); SGD at rate 1 shows it."""
    x, y = torch.full((8,), 2.8), torch.full((8,), 10.0)
    options = {"optimizer": partial(SGD, lr=1.0), "epochs": 1, "batch_size": 8}
    train(*regression(weight=0.0, bias=0.0), (x, y), clip_norm=clip_norm, **options)
    step = torch.stack([pyro.param("weight"), pyro.param("bias")]).double()
    # torch divides by the norm + 1e-6, here 3e-8 of it; the rest is rounding to single precision.
    assert step.norm().item() == pytest.approx(norm, rel=1e-6)
    assert (step[0] / step[1]).item() == pytest.approx(2.8, rel=1e-6), "the direction stays"


def test_schedules_step_once_an_epoch():
    pair = regression()
    data = (torch.randn(20), torch.randn(20))
    history = train(
        *pair,
        data,
        optimizer=partial(SGD, lr=0.5),
        scheduler=partial(StepLR, step_size=2, gamma=0.5),
        epochs=6,
        batch_size=5,
    )
    assert history["learning_rate"] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_schedules_act_on_the_steps():
    """At rates 1/2, 1/4, 1/8 the weight goes those parts of the way to its optimum at 1."""
    ones = torch.ones(8)
    train(
        *regression(),
        (ones, ones),
        optimizer=partial(SGD, lr=0.5),
        scheduler=partial(StepLR, step_size=1, gamma=0.5),
        epochs=3,
        batch_size=8,
    )
    assert pyro.param("weight").item() == 1 - 0.5 * 0.75 * 0.875  # exact in binary


def test_plateau_schedules_see_the_validation_loss():
    """Where x is zero the weight has no effect: the validation loss is constant while the loss decreases."""
    ones, zeros = torch.ones(8), torch.zeros(8)
    options = {
        "optimizer": partial(SGD, lr=0.25),
        "scheduler": partial(ReduceLROnPlateau, patience=1, factor=0.5),
        "epochs": 6,
        "batch_size": 8,
    }
    history = train(*regression(), (ones, ones), validation=(zeros, ones), **options)
    assert history["loss"] == sorted(history["loss"], reverse=True) and len(set(history["loss"])) == 6
    assert len(set(history["validation"])) == 1
    # Two epochs no better than the first halve the rate, from the next epoch on; then two more.
    assert history["learning_rate"] == [0.25, 0.25, 0.25, 0.125, 0.125, 0.0625]
    pyro.clear_param_store()
    history = train(*regression(), (ones, ones), **options)
    assert set(history["learning_rate"]) == {0.25}, "without validation data, the loss, which falls"


# Validation and early stopping.


def test_validation_is_the_loss_per_datum_of_the_data():
    x, y = torch.randn(2500), torch.randn(2500)
    history = train(
        *regression(weight=0.5),
        (x[:10], y[:10]),
        validation=(x, y),
        optimizer=partial(SGD, lr=0.0),
        epochs=1,
        batch_size=5,
    )
    exact = ((y.double() - 0.5 * x.double()) ** 2).mean().item() / 2 + HALF_LOG_2_PI
    # In single precision a sum of n terms is off by log2(n) units of 1.2e-7 or so, torch adding pairwise.
    assert history["validation"] == pytest.approx([exact], rel=12 * 1.2e-7)


@pytest.mark.parametrize("form", ["tuple", "TensorDataset", "DataLoader"])
def test_validation_data_come_in_any_form(form):
    x, y = torch.randn(40), torch.randn(40)
    forms = {
        "tuple": tuple,
        "TensorDataset": lambda xy: TensorDataset(*xy),
        "DataLoader": lambda xy: DataLoader(TensorDataset(*xy), 16),
    }
    history = train(
        *regression(), (x, y), validation=forms[form]((x, y)), optimizer=partial(SGD, lr=0.0), epochs=1, batch_size=40
    )
    assert history["validation"] == pytest.approx(history["loss"], rel=40 * 1.2e-7)


def test_validation_has_the_same_noise_each_time():
    vae, x = normal_vae(), torch.randn(40, 4)
    history = train(vae.model, vae.guide, x, validation=x, optimizer=partial(SGD, lr=0.0), epochs=4, batch_size=40)
    assert len(set(history["loss"])) == 4 and len(set(history["validation"])) == 1


def test_validation_is_in_evaluation_mode():
    """Dropout of nearly everything: the loss equals that without dropout in evaluation mode only."""
    dropout, x, y = nn.Dropout(0.99), torch.randn(64), torch.randn(64)

    def model(x, y):
        weight = pyro.param("weight", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(weight * dropout(x), 1.0), obs=y)

    options = {"optimizer": partial(SGD, lr=0.0), "epochs": 1, "batch_size": 64}
    history = train(model, lambda x, y: None, (x, y), validation=(x, y), **options)
    exact = ((y.double() - x.double()) ** 2).mean().item() / 2 + HALF_LOG_2_PI
    assert history["validation"] == pytest.approx([exact], rel=64 * 1.2e-7)  # single precision
    assert abs(history["loss"][0] - exact) > 0.1, "and training with dropout"


def test_validation_leaves_no_trace_in_training():
    """Weights, running statistics, noise and modes are the same with and without it."""
    grey, held_out = torch.rand(40, 16), torch.rand(30, 16)

    def run(**options) -> tuple[VAE, History]:
        pyro.set_rng_seed(1)
        vae = stateful_vae()
        vae.encoder.network[1].eval()  # a user may have frozen the statistics: that stays
        vae.encoder.network.append(nn.BatchNorm1d(4))
        history = train(vae.model, vae.guide, grey, epochs=3, batch_size=16, transform=dynamic_binarization, **options)
        return vae, history

    (plain, history), (validated, with_validation) = run(), run(validation=held_out)
    assert_same(dict(plain.state_dict()), dict(validated.state_dict()))
    assert history["loss"] == with_validation["loss"]
    assert validated.encoder.network[5].num_batches_tracked == 9  # three passes of three batches, and nothing else
    assert [m.training for m in validated.encoder.network] == [True, False, True, True, True, True]
    assert validated.training and validated.likelihood.training


def stopping(**options: Any) -> History:
    """Gradient descent towards weight 1 at rate 1/4, where 0.6 is best for validation.

    The weight after epoch t is 1 - 0.75^t: 0.25, 0.44, 0.58, 0.68, 0.76, ... The third is the nearest to 0.6.
    """
    ones = torch.ones(8)
    options = {
        "optimizer": partial(SGD, lr=0.25),
        "epochs": 20,
        "batch_size": 8,
        "validation": (ones, 0.6 * ones),
    } | options
    return train(*regression(), (ones, ones), **options)


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_early_stopping_keeps_the_best_weights(patience):
    history = stopping(patience=patience)
    assert history.best_epoch == 3
    assert history["epoch"] == list(range(1, 3 + patience + 1))
    assert pyro.param("weight").item() == 1 - 0.75**3  # exact in binary


def test_the_best_weights_are_kept_when_the_epochs_end_first():
    assert len(stopping(patience=5, epochs=4)) == 4
    assert pyro.param("weight").item() == 1 - 0.75**3


def test_without_patience_the_last_weights_are_kept():
    assert stopping(epochs=4).best_epoch == 3
    assert pyro.param("weight").item() == 1 - 0.75**4


def test_early_stopping_brings_back_running_statistics():
    x = torch.rand(40, 16).round()
    vae = stateful_vae()
    at_epoch = {}

    def keep(history: History) -> None:
        at_epoch[len(history)] = {name: t.clone() for name, t in vae.state_dict().items()}

    history = train(
        vae.model,
        vae.guide,
        x,
        validation=x[:10],
        epochs=12,
        batch_size=16,
        patience=3,
        optimizer=partial(Adam, lr=0.5),
        callbacks=[keep],
    )
    assert history.best_epoch < len(history), "the rate is high enough for the loss to rise in the end"
    assert_same(dict(vae.state_dict()), at_epoch[history.best_epoch])


# The modes of modules.


def modes(module: nn.Module) -> list[bool]:
    return [m.training for m in module.modules()]


def state_after(vae: VAE, **options: Any) -> dict[str, Tensor]:
    """Returns the state after three epochs, and checks that the modes are restored."""
    before = modes(vae)
    pyro.set_rng_seed(1)
    train(vae.model, vae.guide, torch.rand(40, 16).round(), epochs=3, batch_size=16, **options)
    assert modes(vae) == before
    return dict(vae.state_dict())


def same_start() -> VAE:
    pyro.set_rng_seed(0)
    return stateful_vae()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_what_was_in_evaluation_mode_trains_the_same(compile):
    vae = same_start()
    assert_same(state_after(vae.eval(), compile=compile), state_after(same_start(), compile=compile))
    # Also if only some parts are in evaluation mode.
    vae = same_start()
    vae.likelihood.eval(), vae.encoder.eval()
    assert_same(state_after(vae, compile=compile), state_after(same_start(), compile=compile))


def test_a_callback_may_call_eval():
    vae = same_start()
    pyro.set_rng_seed(1)
    callbacks = [lambda history: vae.eval() and None]
    train(vae.model, vae.guide, torch.rand(40, 16).round(), epochs=3, batch_size=16, callbacks=callbacks)
    assert vae.training
    assert_same(dict(vae.state_dict()), state_after(same_start()))


def test_the_mode_is_put_back_after_an_error():
    def failing(history: History) -> None:
        raise RuntimeError("stop here")

    vae = stateful_vae().eval()
    with pytest.raises(RuntimeError, match="stop here"):
        train(vae.model, vae.guide, torch.rand(40, 16).round(), epochs=3, batch_size=16, callbacks=[failing])
    assert not any(modes(vae))


def test_the_optimal_scale_is_estimated_in_training():
    """Its variance is the mean squared error in training mode, and stays where it was in evaluation mode."""

    def variance(train_mode: bool) -> float:
        pyro.set_rng_seed(0)
        x = 0.01 * torch.randn(64, 4)
        vae = VAE(StandardNormal(2), OptimalNormal(2, 4, SMALL), DiagonalNormal(4, 2, SMALL)).train(train_mode)
        train(vae.model, vae.guide, x, epochs=3, batch_size=16)
        return vae.likelihood.variance.item()

    assert variance(False) == variance(True)


def freeze_alone(vae: VAE) -> nn.Module:
    """A layer in evaluation mode, in a model in training mode, whose weights are trained."""
    return vae.encoder.network[1].eval()


def freeze_all_of_it(vae: VAE) -> nn.Module:
    """A layer that is frozen, in a model that was in evaluation mode."""
    return vae.eval().encoder.network[1].requires_grad_(False)


def freeze_a_part(vae: VAE) -> nn.Module:
    """A part of several modules that is frozen, in a model in training mode."""
    return vae.encoder.eval().requires_grad_(False).network[1]


@pytest.mark.parametrize("freeze", [freeze_alone, freeze_all_of_it, freeze_a_part])
def test_what_is_frozen_stays_in_evaluation_mode(freeze):
    vae, seen = stateful_vae(), []
    norm = freeze(vae)
    vae.encoder.network[2].register_forward_pre_hook(lambda dropout, _: seen.append(dropout.training))
    before = {name: b.clone() for name, b in norm.named_buffers()}
    left = state_after(vae, callbacks=[lambda history: vae.train() and None])  # which a callback cannot change
    assert_same({name: left[f"encoder.network.1.{name}"] for name in before}, before)
    assert (True in seen) == (freeze is not freeze_a_part)


# Parameters that belong to rows.


W = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])  # W W^T = I


def one_latent_a_datum(x: Tensor, rows: Tensor | None = None) -> None:
    """z ~ N(0, I), x ~ N(z W, I / 4): the mode of p(z | x) is 4 x W^T / 5, where all second derivatives are 5."""
    with pyro.plate("documents", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z @ W, 0.5).to_event(1), obs=x)


def param_a_row(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(len(x), 2))
    with pyro.plate("documents", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))


class Images(Dataset):
    """A data set that is not in memory."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


@pytest.mark.parametrize("form", [lambda x: x, TensorDataset, Images], ids=["tensor", "TensorDataset", "Dataset"])
def test_rows_stay_with_the_parameters_that_belong_to_them(form):
    x = torch.randn(40, 3)
    guide = AutoDelta(one_latent_a_datum)
    # A step of the mean loss: 1 / 40 of the gradient, times 40 / 5, is Newton's, which needs one step.
    history = train(one_latent_a_datum, guide, form(x), epochs=3, batch_size=40, optimizer=partial(SGD, lr=40 / 5))
    mode = 0.8 * x @ W.T
    # A step from numbers of size one rounds by some units of 1.2e-7, times the condition number of one.
    torch.testing.assert_close(guide.median()["z"].detach(), mode, rtol=0, atol=100 * 1.2e-7)
    log_joint = dist.Normal(0.0, 1.0).log_prob(mode).sum() + dist.Normal(mode @ W, 0.5).log_prob(x).sum()
    assert history["loss"][-1] == pytest.approx(-log_joint.item() / 40, rel=200 * 1.2e-7)  # a sum of 200 terms


@pytest.mark.parametrize("form", [lambda x: x, TensorDataset, Images], ids=["tensor", "TensorDataset", "Dataset"])
def test_rows_stay_in_their_order_in_a_batch_of_all(form):
    """They may be steps of a series, whose model has no plate."""
    seen = []

    def random_walk(x):
        seen.append(x.flatten().tolist())
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(torch.cat([torch.zeros_like(x[:1]), x[:-1]]), scale).to_event(2), obs=x)

    x = torch.arange(30.0).reshape(30, 1)
    train(random_walk, lambda x: None, form(x), epochs=3, batch_size=64)
    assert len(seen) > 3 and all(rows == sorted(rows) for rows in seen if len(rows) == 30)


ROWS = {
    "AutoNormal": lambda: AutoNormal(one_latent_a_datum),
    "AutoDiagonalNormal": lambda: AutoDiagonalNormal(one_latent_a_datum),
    "AutoDelta": lambda: AutoDelta(one_latent_a_datum),
    "pyro.param": lambda: param_a_row,
}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("form", [lambda x: x, Images], ids=["tensor", "Dataset"])
def test_parameters_of_rows_cannot_be_trained_by_small_batches(make, form):
    guide = make()
    with pytest.raises(ValueError, match=r"parameters '.*(loc|z).*' belong to the 10 rows.*batch_size=len\(data\)"):
        train(one_latent_a_datum, guide, form(torch.randn(40, 3)), epochs=1, batch_size=10)


def test_the_first_rows_of_a_parameter_are_rows_too():
    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(40, 2))[: len(x)]
        with pyro.plate("documents", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    with pytest.raises(ValueError, match="'loc' belong to the 16 rows"):
        train(one_latent_a_datum, guide, torch.randn(40, 3), epochs=1, batch_size=16)


def test_loaders_may_keep_rows_in_their_order():
    x = torch.randn(40, 3)
    guide = AutoDelta(one_latent_a_datum)
    train(one_latent_a_datum, guide, DataLoader(x, batch_size=40), epochs=2, optimizer=partial(SGD, lr=40 / 5))
    torch.testing.assert_close(guide.median()["z"].detach(), 0.8 * x @ W.T, rtol=0, atol=100 * 1.2e-7)


def amortised() -> tuple:
    """A network as wide as there are rows in a batch, with units that are off, batch norm and dropout."""
    network = nn.Sequential(nn.Linear(3, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 2))

    def guide(x):
        pyro.module("encoder", network)
        with pyro.plate("documents", len(x)):
            pyro.sample("z", dist.Normal(network(x), 0.1).to_event(1))

    return one_latent_a_datum, guide, torch.randn(40, 3)


def decoded() -> tuple:
    """A decoder with few units, most of them off, and as many outputs as there are rows."""
    vae = VAE(StandardNormal(2), Bernoulli(2, 10, partial(MLP, hidden=(3,))), DiagonalNormal(10, 2, SMALL))
    return vae.model, vae.guide, torch.rand(40, 10).round()


def looked_up() -> tuple:
    """A parameter for each datum, looked up by the number of the datum."""

    def guide(x, rows):
        loc = pyro.param("loc", lambda: torch.zeros(40, 2))[rows]
        with pyro.plate("documents", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    return one_latent_a_datum, guide, (torch.randn(40, 3), torch.arange(40))


def clustered() -> tuple:
    """As many components as rows. Each datum draws one of them."""
    classifier = nn.Linear(3, 10)

    def model(x):
        locs = pyro.param("locs", lambda: torch.randn(10, 3))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", dist.Normal(locs[pyro.sample("k", dist.Categorical(torch.ones(10)))], 1.0).to_event(1), obs=x
            )

    def guide(x):
        pyro.module("classifier", classifier)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=classifier(x)))

    return model, guide, torch.randn(40, 3)


def shared() -> tuple:
    """A latent of all data, with as many dimensions as there are rows."""

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(10), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return model, AutoNormal(model), torch.randn(40, 10)


def pooled() -> tuple:
    """A guide that looks at all rows for each."""
    network = nn.Linear(3, 20)

    def guide(x):
        pyro.module("encoder", network)
        loc = network(x)[:, :2] + network(x)[:, 2:].mean()
        with pyro.plate("documents", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    return one_latent_a_datum, guide, torch.randn(40, 3)


def sorted_rows() -> tuple:
    """A model that takes rows in one order only, in which a transform puts them."""

    def model(x):
        if bool((x[:, 0].diff() < 0).any()):
            raise ValueError("rows are out of order")
        one_latent_a_datum(x)

    return model, amortised()[1], torch.randn(40, 3), lambda x: x[x[:, 0].argsort()]


@pytest.mark.parametrize("make", [amortised, decoded, looked_up, clustered, shared, pooled, sorted_rows])
@pytest.mark.parametrize("seed", range(5))
def test_what_goes_with_the_data_is_not_taken_for_what_goes_with_rows(make, seed):
    pyro.set_rng_seed(seed)
    model, guide, x, *transform = make()
    train(model, guide, x, epochs=1, batch_size=10, **({"transform": transform[0]} if transform else {}))


# Callbacks and the history.


def test_callbacks():
    seen = []

    def first(history: History) -> str:
        seen.append(("first", len(history)))
        history.records[-1]["note"] = 10 * len(history)
        return "not True"

    def second(history: History) -> bool:
        seen.append(("second", history["note"][-1]))
        return len(history) == 3

    def third(history: History) -> None:
        seen.append(("third", len(history)))

    history = stopping(callbacks=[first, second, third])
    assert seen == [(name, n) for i in (1, 2, 3) for name, n in (("first", i), ("second", 10 * i), ("third", i))]
    assert history["note"] == [10, 20, 30]


@pytest.mark.parametrize("true", [True, np.True_, np.mean([2.0]) > 1, torch.tensor(1.0) > 0], ids=repr)
def test_any_true_boolean_stops(true):
    assert len(stopping(callbacks=[lambda history: true], epochs=3)) == 1


@pytest.mark.parametrize(
    "other", [None, False, np.False_, 1, "stop", [True], np.ones(1, bool), torch.ones(1), torch.tensor(False)], ids=repr
)
def test_nothing_else_stops(other):
    assert len(stopping(callbacks=[lambda history: other], epochs=3)) == 3


def test_callbacks_may_use_pyro_for_themselves():
    def probe(history: History) -> None:
        pyro.param(f"probe {len(history)}", torch.tensor(0.0))

    assert len(stopping(callbacks=[probe], epochs=3)) == 3


def test_a_file_of_metrics_holds_the_history_also_after_a_resume(tmp_path):
    """The interrupted run wrote an epoch after its last checkpoint, which the resumed run writes again."""
    path, state = tmp_path / "metrics.jsonl", tmp_path / "checkpoint"

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    history = stopping(epochs=2, callbacks=[MetricsFile(path)], checkpoint=state)
    assert read() == history.records
    with open(path, "a") as file:
        file.write(json.dumps({"epoch": 3}) + "\n")
    pyro.clear_param_store()
    history = stopping(epochs=4, callbacks=[MetricsFile(path)], checkpoint=state, resume=True)
    assert read() == history.records and len(history) == 4


def test_a_file_of_metrics_takes_numbers_of_numpy_and_torch(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write([{"numpy": np.float32(0.5), "array": np.arange(2), "torch": torch.tensor([0.5]), "text": "a"}])
    assert json.loads(metrics.path.read_text()) == {"numpy": 0.5, "array": [0, 1], "torch": [0.5], "text": "a"}
    before = metrics.path.read_text()
    with pytest.raises(TypeError, match="cannot hold a set.*Use numbers"):
        metrics.write([{"strange": {1}}])
    assert metrics.path.read_text() == before


def test_a_callback_keeps_its_state_in_the_history(tmp_path):
    """It counts over a resume because it reads what it wrote to the records, which checkpoints hold."""

    def count(history: History) -> None:
        before = history.records[-2]["calls"] if len(history) > 1 else 0
        history.records[-1]["calls"] = before + 1

    stopping(epochs=2, callbacks=[count], checkpoint=tmp_path / "run")
    pyro.clear_param_store()
    history = stopping(epochs=4, callbacks=[count], checkpoint=tmp_path / "run", resume=True)
    assert history["calls"] == [1, 2, 3, 4]


def test_history_gives_columns_and_tables(tmp_path):
    history = stopping(epochs=3, scheduler=partial(StepLR, step_size=1, gamma=0.5))
    assert len(history) == 3 and history["epoch"] == [1, 2, 3]
    assert list(history.records[0]) == ["epoch", "loss", "validation", "learning_rate", "seconds"]
    assert history["seconds"] == sorted(history["seconds"]) and history["seconds"][0] > 0
    history.records[-1]["note"] = "late"
    assert history["note"] == [None, None, "late"]
    with pytest.raises(KeyError, match="no record holds 'accuracy'; they hold .*'loss'"):
        history["accuracy"]
    assert "note" not in str(history)  # most of its rows would be empty
    history.records[0]["note"] = "early"
    lines = str(history).splitlines()
    assert lines[0].split() == ["epoch", "loss", "validation", "learning_rate", "seconds", "note"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"] and lines[3].endswith("late")
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_long_histories_are_thinned():
    history = History([{"epoch": i, "loss": 1.0 / i} for i in range(1, 1001)])
    epochs = [int(line.split()[0]) for line in history.table(max_rows=5).splitlines()[1:]]
    assert epochs[0] == 1 and epochs[-1] == 1000 and len(epochs) == 5
    gaps = np.diff(epochs)
    assert gaps.max() - gaps.min() <= 1
    assert len(str(history).splitlines()) == 21


def test_an_empty_history():
    history = History()
    assert len(history) == 0 and history.best_epoch is None and history.table() == ""
    with pytest.raises(KeyError, match="they hold nothing"):
        history["loss"]


def test_the_best_epoch_is_the_first_of_equals():
    assert History([{"epoch": 1, "loss": 1.0}]).best_epoch is None
    records = [{"epoch": i + 1, "validation": v} for i, v in enumerate([3.0, 1.0, 2.0, 1.0])]
    assert History(records).best_epoch == 2


def test_history_draws_itself(tmp_path):
    from matplotlib import pyplot

    figure = stopping(epochs=3).plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    [axes] = figure.axes
    drawn = [list(line.get_ydata()) for line in axes.get_lines()]
    assert any(len(y) == 3 and y == sorted(y, reverse=True) for y in drawn), "the loss falls in this run"
    pyplot.close(figure)


# The same seed, and interrupted runs.


def stateful_run(
    seed: int, epochs: int, optimizer, scheduler, data_size: int = 40, **options: Any
) -> tuple[VAE, History]:
    """Trains with everything that has state: statistics, dropout, momentum, a schedule, noise, the best weights."""
    pyro.set_rng_seed(seed)
    vae = stateful_vae()
    grey = torch.rand(data_size, 16, generator=torch.Generator().manual_seed(5))
    options = {"batch_size": 16, "patience": 50, "clip_norm": 5.0} | options
    history = train(
        vae.model,
        vae.guide,
        grey,
        epochs=epochs,
        transform=dynamic_binarization,
        validation=grey[:10],
        optimizer=optimizer,
        scheduler=scheduler,
        **options,
    )
    return vae, history


STATES = {
    "Adam, StepLR": (loop.Adam, partial(StepLR, step_size=2, gamma=0.5)),
    "SGD, plateau": (partial(SGD, lr=0.05, momentum=0.9), partial(ReduceLROnPlateau, patience=1)),
    "AdamW, cosine": (partial(torch.optim.AdamW, lr=0.1, amsgrad=True), partial(CosineAnnealingLR, T_max=6)),
    "SGD, one cycle": (partial(SGD, lr=0.05, momentum=0.9), partial(OneCycleLR, max_lr=0.1)),
    "RMSprop": (partial(torch.optim.RMSprop, lr=0.01, centered=True), None),
}


def in_order() -> DataLoader:
    x = torch.rand(32, 16, generator=torch.Generator().manual_seed(5)).round()
    return DataLoader(x, batch_size=16)


def averaged_by_hand(ema_decay: float | None, scheduler, epochs: int) -> tuple[VAE, list[float]]:
    """Trains without fit; averages weights and buffers, and steps a schedule, after every step; returns the rates."""
    pyro.set_rng_seed(3)
    vae, batches, elbo = stateful_vae(), in_order(), Trace_ELBO()
    next(iter(batches))  # like fit, which looks at one batch first
    optimizer = SGD(vae.parameters(), lr=0.05, momentum=0.9)
    schedule, average, rates = scheduler and scheduler(optimizer), None, []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            (elbo.differentiable_loss(vae.model, vae.guide, batch) / 16).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if schedule is not None:
                schedule.step()
            state = {name: t.detach().clone() for name, t in vae.state_dict().items()}
            average = average or state
            average = {
                name: torch.lerp(average[name], t, 1 - ema_decay) if ema_decay and t.is_floating_point() else t
                for name, t in state.items()
            }
    vae.load_state_dict(average)
    return vae, rates


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("ema_decay", [None, 0.7])
@pytest.mark.parametrize(
    "scheduler",
    [None, partial(OneCycleLR, max_lr=0.2), partial(CosineAnnealingWarmRestarts, T_0=2)],
    ids=["constant", "one cycle", "warm restarts"],
)
def test_averages_and_schedules_of_steps_are_those_of_a_loop_written_by_hand(compile, ema_decay, scheduler):
    epochs, given = 5, scheduler
    if scheduler is not None and scheduler.func is OneCycleLR:
        given = partial(scheduler, total_steps=2 * epochs)  # that of the run, which fit gives it by itself
    expected, rates = averaged_by_hand(ema_decay, given, epochs)
    pyro.set_rng_seed(3)
    vae, seen = stateful_vae(), []
    optimizer = SGD(vae.parameters(), lr=0.05, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    train(
        vae.model,
        vae.guide,
        in_order(),
        epochs=epochs,
        optimizer=optimizer,
        scheduler=scheduler,
        schedule_every_step=scheduler is not None,
        ema_decay=ema_decay,
        compile=compile,
    )
    assert seen == rates
    assert_same(dict(vae.state_dict()), dict(expected.state_dict()))


def test_validation_callbacks_and_the_best_weights_are_those_of_the_average():
    seen = []
    vae, x = normal_vae(), torch.randn(40, 4)

    def look(history: History) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with evaluation_mode():
                seen.append(Trace_ELBO().loss(vae.model, vae.guide, x) / len(x))

    options = {"validation": x, "patience": 9, "ema_decay": 0.8, "batch_size": 10, "callbacks": [look]}
    history = train(vae.model, vae.guide, x, epochs=4, **options)
    assert seen == pytest.approx(history["validation"], rel=1e-6)
    look(history)  # the weights at the end are those of the best epoch
    assert seen[-1] == pytest.approx(min(history["validation"]), rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule_every_step": True}, "schedule_every_step=True needs a scheduler that counts steps, got none"),
        (
            {"schedule_every_step": True, "scheduler": ReduceLROnPlateau},
            "got ReduceLROnPlateau, which follows the loss of epochs",
        ),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1, such as 0.999"),
        ({"ema_decay": "0.9"}, "ema_decay must be between 0 and 1"),
        (
            {"scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=3), "epochs": 4},
            "OneCycleLR takes 3 epochs and cannot go on, but the run has 4",
        ),
    ],
)
def test_options_of_schedules_and_averages_that_do_not_fit_are_refused(options, message):
    vae = normal_vae()
    with pytest.raises(ValueError, match=message):
        train(vae.model, vae.guide, torch.randn(20, 4), **{"batch_size": 10, "epochs": 2} | options)


@pytest.mark.parametrize("by_step, unit, run", [(False, "epochs", 2), (True, "steps", 4)])
@pytest.mark.parametrize(
    "schedule",
    [partial(CosineAnnealingLR, T_max=100), partial(ConstantLR, total_iters=100)],
    ids=["cosine", "constant"],
)
def test_a_schedule_that_does_not_end_is_told(schedule, by_step, unit, run):
    vae, options = normal_vae(), {"batch_size": 10, "epochs": 2, "schedule_every_step": by_step}
    with pytest.warns(UserWarning, match=f"takes 100 {unit}, but the run has {run}: it does not come to its end"):
        train(vae.model, vae.guide, torch.randn(20, 4), scheduler=schedule, **options)


@pytest.mark.parametrize("by_step, unit, run", [(False, "epochs", 3), (True, "steps", 6)])
def test_a_cosine_that_rises_again_is_told(by_step, unit, run):
    vae, schedule = normal_vae(), partial(CosineAnnealingLR, T_max=run - 1)
    with pytest.warns(UserWarning, match=f"falls over {run - 1} {unit} and then rises again, but the run has {run}"):
        train(
            vae.model,
            vae.guide,
            torch.randn(20, 4),
            scheduler=schedule,
            batch_size=10,
            epochs=3,
            schedule_every_step=by_step,
        )


def test_the_same_seed_gives_the_same_result():
    one, history = stateful_run(3, 4, *STATES["Adam, StepLR"])
    other, again = stateful_run(3, 4, *STATES["Adam, StepLR"])
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert without_seconds(history) == without_seconds(again)
    _, another = stateful_run(4, 4, *STATES["Adam, StepLR"])
    assert another["loss"] != history["loss"], "and another seed another one"


@pytest.mark.filterwarnings("ignore:the schedule CosineAnnealingLR falls over 6 steps")
@pytest.mark.parametrize("optimizer, scheduler", STATES.values(), ids=STATES)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer, scheduler, at, ema_decay):
    # Schedules that follow no loss step after every step in one of two runs.
    by_step = scheduler is not None and scheduler.func is not ReduceLROnPlateau and ema_decay is not None
    run = partial(stateful_run, optimizer=optimizer, scheduler=scheduler, ema_decay=ema_decay)
    run = partial(run, schedule_every_step=by_step, epochs=6)
    whole, history = run(3, checkpoint=tmp_path / "whole")
    run(3, checkpoint=tmp_path / "parts", callbacks=[lambda history: len(history) == at])
    # Other weights and other noise at the start: the checkpoint replaces both.
    parts, resumed = run(99, checkpoint=tmp_path / "parts", resume=True)
    assert_same(dict(parts.state_dict()), dict(whole.state_dict()))
    assert without_seconds(resumed) == without_seconds(history)
    assert resumed["seconds"] == sorted(resumed["seconds"]), "the clock goes on"
    a, b = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    for state in (a, b):
        for record in state["history"]:
            del record["seconds"]
    assert_same(a, b)


def test_epochs_count_from_the_very_start(tmp_path):
    _, history = stateful_run(3, 3, *STATES["Adam, StepLR"], checkpoint=tmp_path / "run")
    _, again = stateful_run(99, 3, *STATES["Adam, StepLR"], checkpoint=tmp_path / "run", resume=True)
    assert without_seconds(again) == without_seconds(history), "nothing was left to do"
    _, fewer = stateful_run(99, 2, *STATES["Adam, StepLR"], checkpoint=tmp_path / "run", resume=True)
    assert len(fewer) == 3


def test_resuming_where_there_is_no_checkpoint_starts_anew(tmp_path):
    one, _ = stateful_run(3, 2, *STATES["Adam, StepLR"])
    other, _ = stateful_run(3, 2, *STATES["Adam, StepLR"], checkpoint=tmp_path / "run", resume=True)
    assert_same(dict(one.state_dict()), dict(other.state_dict()))


def test_a_run_that_was_stopped_early_stays_stopped(tmp_path):
    stopping(patience=2, checkpoint=tmp_path / "run")
    pyro.clear_param_store()
    history = stopping(patience=2, checkpoint=tmp_path / "run", resume=True)
    assert len(history) == 5 and pyro.param("weight").item() == 1 - 0.75**3
    pyro.clear_param_store()
    history = stopping(patience=4, checkpoint=tmp_path / "run", resume=True)  # from the last weights, not the best
    assert len(history) == 7 and pyro.param("weight").item() == 1 - 0.75**3
    assert history["validation"] == stopping_losses(7)


def stopping_losses(epochs: int) -> Any:
    """The validation losses of `stopping`, to single precision."""
    return pytest.approx([(0.6 - (1 - 0.75**t)) ** 2 / 2 + HALF_LOG_2_PI for t in range(1, epochs + 1)], rel=1e-6)


def test_a_run_may_be_resumed_with_patience(tmp_path):
    """Without validation so far, there is no best epoch yet."""
    stopping(epochs=1, validation=None, checkpoint=tmp_path / "run")
    pyro.clear_param_store()
    history = stopping(patience=2, checkpoint=tmp_path / "run", resume=True)
    assert history["validation"][0] is None and history.best_epoch == 3 and len(history) == 5
    assert pyro.param("weight").item() == 1 - 0.75**3


class Noisy(Dataset):
    """Data with noise of its own, from the three random states that people use."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(4) + np.random.randn() + random.gauss(0.0, 1.0) + i / 40


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


RESUMABLE = {
    "global random states": lambda: DataLoader(Noisy(), 16, shuffle=True),
    "data set": Noisy,
    "own generator": lambda: DataLoader(Noisy(), 16, shuffle=True, generator=seeded()),
    "sampler with its own": lambda: DataLoader(
        Noisy(), 16, sampler=WeightedRandomSampler(torch.ones(40), 30, generator=seeded())
    ),
    "both": lambda: DataLoader(
        Noisy(), 16, generator=seeded(), sampler=WeightedRandomSampler(torch.ones(40), 30, generator=seeded())
    ),
    "batch sampler with its own": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy(), generator=seeded()), 16, drop_last=False)
    ),
}


@pytest.mark.parametrize("data", RESUMABLE.values(), ids=RESUMABLE)
def test_loaders_are_resumed(tmp_path, data):
    def run(seed: int, epochs: int, name: str) -> VAE:
        pyro.set_rng_seed(seed)
        vae = normal_vae()
        train(vae.model, vae.guide, data(), epochs=epochs, batch_size=16, checkpoint=tmp_path / name, resume=True)
        return vae

    whole = run(3, 4, "whole")
    run(3, 2, "parts")
    assert_same(dict(run(99, 4, "parts").state_dict()), dict(whole.state_dict()))


def test_buffers_outside_forward_are_resumed(tmp_path):
    """A hand-written module may keep a state of its own and have methods for model and guide, like a VAE."""

    class Counting(VAE):
        def __init__(self):
            super().__init__(StandardNormal(2), Normal(2, 4, SMALL), DiagonalNormal(4, 2, SMALL))
            self.register_buffer("seen", torch.tensor(0.0))

        def model(self, x):
            if self.training and torch.is_grad_enabled():
                self.seen += len(x)
            super().model(x)

    def run(epochs: int, name: str) -> Counting:
        vae = Counting()
        train(
            vae.model,
            vae.guide,
            torch.randn(40, 4),
            epochs=epochs,
            batch_size=16,
            checkpoint=tmp_path / name,
            resume=True,
        )
        return vae

    run(2, "run")
    assert run(3, "run").seen == 3 * 40


# Killed.


def work(folder: Path, moments: Moments | None = None) -> None:
    """Trains, with a checkpoint after every epoch and moments to be killed at in between, and writes the weights."""
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would take most of the time
    clock = itertools.count()
    now = [0.0]
    # A write takes no time, an epoch a second.
    loop.time = checkpoints.time = types.SimpleNamespace(monotonic=lambda: now[0])

    def pass_one(*batch: Tensor) -> tuple[Tensor, ...]:
        if moments is not None:
            moments.pass_one()
        return dynamic_binarization(*batch)

    def tick(_: History) -> None:
        now[0] = float(next(clock) + 1)

    pyro.set_rng_seed(3)
    vae = stateful_vae()
    grey = torch.rand(40, 16)
    optimizer, scheduler = STATES["Adam, StepLR"]
    history = train(
        vae.model,
        vae.guide,
        grey,
        epochs=8,
        batch_size=16,
        optimizer=optimizer,
        scheduler=scheduler,
        transform=pass_one,
        validation=grey[:10],
        patience=50,
        callbacks=[tick],
        checkpoint=folder / "checkpoint",
        resume=True,
    )
    save(vae, folder / "weights")
    (folder / "history").write_text(repr([{**record, "seconds": None} for record in history.records]))


# A run passes one moment in its first look at the data and four in writing its first checkpoint (half of it, before the
# flush, before the renaming, after it); then, every epoch, three in its steps, one in validation and four in writing.
# The first eight of these come before any epoch is kept; the others keep six of the eight epochs, one by one.
MOMENTS = (1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 11, 18, 20, 21, 15)


def work_undisturbed(folder: Path) -> None:
    work(folder)


def work_and_be_killed(folder: Path) -> None:
    """Trains in processes that are killed, at counted and at random moments, until one of them finishes."""
    importlib.import_module("torch._dynamo")  # a torch optimizer imports it, in seconds: once, not in every process
    for last in MOMENTS:
        assert ended_by(partial(work, folder), last=last) == signal.SIGKILL
    clock, killed = random.Random(0), 0
    while ended_by(partial(work, folder), seconds=clock.uniform(0.0, 0.3)) == signal.SIGKILL and killed < 6:
        killed += 1
    assert ended_by(partial(work, folder)) == 0
    print(len(MOMENTS) + killed)


def test_killed_and_resumed_to_the_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    in_new_process("test_training.work_undisturbed", whole)
    killed = int(in_new_process("test_training.work_and_be_killed", parts))
    assert killed >= len(MOMENTS)
    assert (parts / "weights").read_bytes() == (whole / "weights").read_bytes()
    assert (parts / "history").read_text() == (whole / "history").read_text()
    assert len(read_checkpoint(parts / "checkpoint")["history"]) == 8


# Errors. Nothing may be written or changed.


def refused(error: type[Exception], match: str, model, guide, data, **options: Any) -> None:
    """Asserts that fit raises, and that the state of the model's module, if it has one, stays as it was."""
    module = getattr(model, "__self__", nn.Module())
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(error, match=match):
        train(model, guide, data, **({"epochs": 2, "batch_size": 10} | options))
    assert_same(dict(module.state_dict()), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["data", "validation"])
def test_data_that_is_not_finite(tmp_path, bad, argument):
    vae, x = normal_vae(), torch.randn(40, 4)
    spoilt = x.clone()
    spoilt[17, 2] = spoilt[30, 1] = bad
    arguments = {"data": x, "validation": x} | {argument: spoilt}
    refused(
        ValueError,
        f"{argument} holds NaN or infinity in 2 of 40 rows, the first of them row 17",
        vae.model,
        vae.guide,
        checkpoint=tmp_path / "run",
        **arguments,
    )
    assert not list(tmp_path.iterdir())


def test_the_second_of_a_tuple_is_checked_too():
    vae, labels = normal_vae(context_dim=3), torch.ones(40, 3)
    labels[5] = math.nan
    refused(ValueError, "data holds NaN.*row 5", vae.model, vae.guide, (torch.randn(40, 4), labels))


def test_loaders_are_checked_as_they_go():
    vae, x = normal_vae(), torch.randn(40, 4)
    x[34] = math.nan
    with pytest.raises(ValueError, match="data holds NaN or infinity in 1 of 10 rows, the first of them row 4"):
        train(vae.model, vae.guide, DataLoader(Wrap(x), 10), epochs=1)


class Wrap(Dataset):
    """Rows of a tensor one by one."""

    def __init__(self, x: Any):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i]


@pytest.mark.parametrize("row", [0, 35], ids=["in the first batch", "in the last batch"])
def test_grey_pixels_are_not_bernoulli(row):
    x = torch.zeros(40, 16)
    x[row] = 0.5
    vae = VAE(StandardNormal(2), Bernoulli(2, 16, SMALL), DiagonalNormal(16, 2, SMALL))
    with pytest.raises(ValueError, match='site "x".*outside the support of Bernoulli.*row [05] .*dynamic_binarization'):
        train(vae.model, vae.guide, DataLoader(Wrap(x), 10), epochs=1)


def test_grey_pixels_from_a_transform_in_a_later_epoch():
    """A transform gives new values in every epoch, so they are checked in every epoch."""
    calls = itertools.count()

    def transform(x: Tensor) -> Tensor:
        return x + 0.5 if next(calls) > 10 else x  # the first batch and two epochs of four batches pass

    vae = VAE(StandardNormal(2), Bernoulli(2, 16, SMALL), DiagonalNormal(16, 2, SMALL))
    with pytest.raises(ValueError, match='site "x".*outside the support of Bernoulli'):
        train(vae.model, vae.guide, torch.zeros(40, 16), transform=transform, epochs=4, batch_size=10)


def test_grey_pixels_in_validation_data():
    x = torch.zeros(40, 16)
    vae = VAE(StandardNormal(2), Bernoulli(2, 16, SMALL), DiagonalNormal(16, 2, SMALL))
    with pytest.raises(ValueError, match='site "x".*outside the support of Bernoulli.*dynamic_binarization'):
        train(vae.model, vae.guide, x, validation=x + 0.5, epochs=1, batch_size=10)


BAD_DATA = {
    "another shape": (torch.randn(40, 5), ValueError, r"inputs of shape \(\.\.\., 4\), got \(10, 5\)"),
    "no data": (torch.zeros(0, 4), ValueError, "data: argument 1 is empty"),
    "no data in a data set": (Wrap(torch.zeros(0, 4)), ValueError, "data is empty"),
    "a number": (torch.tensor(1.0), ValueError, "data: there is no tensor, array or list"),
    "lengths that differ": (
        [torch.randn(40, 4), torch.randn(39, 4)],
        ValueError,
        "data: argument 1 has 40 rows but argument 2 has 39",
    ),
    "an array of another shape": (np.ones((40, 5)), ValueError, r"inputs of shape \(\.\.\., 4\), got \(10, 5\)"),
    "two numbers": ([1.0, 2.0], ValueError, "data: there is no tensor, array or list"),
    "nothing": ([], ValueError, "data: there is no tensor, array or list"),
    "None": (None, TypeError, "data must be a tensor.*NoneType"),
    "a loader of dicts": (
        DataLoader(Wrap([{"x": torch.ones(4)}] * 40), 10),
        TypeError,
        "takes a tensor, got a dict.*transform=",
    ),
    "a loader that drops all": (
        DataLoader(Wrap(torch.randn(9, 4)), 10, drop_last=True),
        ValueError,
        "data gives no batch",
    ),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(tmp_path, kind):
    vae, (data, error, match) = normal_vae(), BAD_DATA[kind]
    refused(error, match, vae.model, vae.guide, data, checkpoint=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_bad_validation_data():
    vae, x = normal_vae(), torch.randn(40, 4)
    refused(ValueError, "validation: argument 1 is empty", vae.model, vae.guide, x, validation=x[:0])
    refused(TypeError, "validation must be a tensor", vae.model, vae.guide, x, validation="x")
    loader = DataLoader(Wrap(x[:9]), 10, drop_last=True)
    refused(ValueError, "validation", vae.model, vae.guide, x, validation=loader, optimizer=partial(SGD, lr=0.0))


def test_a_stream_that_flows_once():
    """An iterator is empty in the second epoch, or in the first if the first batch was taken from it."""

    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter(torch.randn(40, 4))

        def __iter__(self) -> Iterator[Tensor]:
            return self.rows

    vae = normal_vae()
    with pytest.raises(ValueError, match="data"):
        train(vae.model, vae.guide, Once(), epochs=3, batch_size=10)


BAD_ARGUMENTS = {
    **{
        f"{name}={value!r}": ({name: value}, ValueError, name)
        for name in ("epochs", "batch_size")
        for value in (0, -1, 2.5, "3", None, True, np.float64(2))
    },
    **{f"clip_norm={value}": ({"clip_norm": value}, ValueError, "clip_norm") for value in (0.0, -1, math.nan)},
    "patience=0": ({"patience": 0, "validation": torch.randn(5, 4)}, ValueError, "patience"),
    "patience alone": ({"patience": 3}, ValueError, "patience.*give validation data"),
    "resume alone": ({"resume": True}, ValueError, "resume=True needs a checkpoint"),
}


def test_numpys_integers_are_integers():
    vae, x = normal_vae(), torch.randn(40, 4)
    options = {"epochs": np.int64(3), "batch_size": np.int32(16), "patience": np.int64(3), "validation": x}
    assert len(train(vae.model, vae.guide, x, **options)) == 3


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments(tmp_path, kind):
    vae, (options, error, match) = normal_vae(), BAD_ARGUMENTS[kind]
    options = options if "resume" in options else {"checkpoint": tmp_path / "run"} | options
    refused(error, match, vae.model, vae.guide, torch.randn(40, 4), **options)
    assert not list(tmp_path.iterdir())


def latent(name: str, plate: str = "data", size: int | None = None, dim: int | None = None) -> Callable:
    def part(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate(plate, size or len(x), dim=dim):
            pyro.sample(name, dist.Normal(loc, 1.0))

    return part


def observing(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


BAD_PAIRS = {
    "a site missed": (observing, lambda x: pyro.param("loc", torch.tensor(0.0)), 'guide misses the latent site "z"'),
    "another name": (observing, latent("y"), 'guide misses the latent site "z".*it has "y"'),
    "another size": (observing, latent("z", size=1), 'plates of site "z" differ.*size 10.*size 1'),
    "another dimension": (observing, latent("z", dim=-2), 'plates of site "z" differ.*dim -1.*dim -2'),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_models_and_guides_that_do_not_fit(kind):
    model, guide, match = BAD_PAIRS[kind]
    refused(ValueError, match, model, guide, torch.randn(40))


def test_nothing_to_train():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    refused(ValueError, "no parameters to train", observing, guide, torch.randn(40))


def test_parameters_that_come_late():
    """The optimizer would not know them: they would never be trained."""
    calls = itertools.count()

    def guide(x):
        name = "loc" if next(calls) < 5 else "another"
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param(name, torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="new parameter at step [0-9]+.*'another'"):
        train(observing, guide, torch.randn(40), epochs=2, batch_size=10)


def test_a_name_that_another_model_holds():
    """Pyro's store is keyed by name: of two models with one name, the second would never be trained."""
    x = torch.randn(40, 4)
    train(*closures(), x, epochs=1, batch_size=10)
    with pytest.raises(ValueError, match="decoder|encoder"):
        train(*closures(), x, epochs=1, batch_size=10)


# Losses and parameters that are not finite.


def test_a_parameter_that_overflows(tmp_path):
    """At rate 1e38 the first step takes the weight, whose gradient is -100, beyond single precision."""
    ones = torch.ones(40)
    data = DataLoader(TensorDataset(ones, 100 * ones), 10)
    options = {"optimizer": partial(SGD, lr=1e38), "checkpoint": tmp_path / "run"}
    with pytest.raises(FloatingPointError, match=r"at step 2 \(epoch 1\): parameter 'weight' is no longer finite"):
        train(*regression(), data, **options)
    assert read_checkpoint(tmp_path / "run")["params"]["0 weight"] == 0, "the checkpoint keeps the last good state"


def test_a_parameter_that_overflows_in_the_last_step(tmp_path):
    """No later step shows it. It is found at the end of the epoch, before anything is saved."""
    ones = torch.ones(40)
    options = {"optimizer": partial(SGD, lr=1e38), "checkpoint": tmp_path / "run", "epochs": 1, "batch_size": 40}
    with pytest.raises(FloatingPointError, match="in epoch 1: parameter 'weight' is no longer finite"):
        train(*regression(), (ones, 100 * ones), **options)
    assert read_checkpoint(tmp_path / "run")["params"]["0 weight"] == 0


def spoilt_above(limit: float, part: str) -> Pair:
    """A model or guide that gives NaN for a datum above a limit."""

    def spoil(x: Tensor, here: str) -> Tensor:
        return torch.where(x > limit, math.nan, 0.0) if here == part else torch.zeros_like(x)

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + loc + spoil(x, "model"), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z",
                dist.Normal(spoil(x, "guide"), pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)),
            )

    return Pair(model, guide)


@pytest.mark.parametrize("part, site", [("model", "x"), ("guide", "z")])
@pytest.mark.parametrize("validate", [True, False], ids=["pyro validates", "pyro does not"])
@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own, where it does not validate
def test_a_site_that_turns_nan(part, site, validate):
    x = torch.zeros(40)
    x[25] = 10.0  # in the third batch
    message = rf'at step 3 \(epoch 1\): the .* of site "{site}" in the {part} is nan'
    with pyro.validation_enabled(validate), pytest.raises(FloatingPointError, match=message):
        train(*spoilt_above(5.0, part), DataLoader(Wrap(x), 10))


def test_validation_that_turns_nan():
    x = torch.zeros(40)
    with pytest.raises(FloatingPointError, match='site "x" in the model is nan'):
        train(*spoilt_above(5.0, "model"), x, validation=x + 10, batch_size=10)


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own, where it does not validate
def test_a_run_that_broke_down_can_be_resumed(tmp_path):
    """After the cause is removed, the result is that of a run without it."""
    broken = [False]

    def run(name: str, break_at: int = 99, **options) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        vae = normal_vae()

        def model(x):
            pyro.module(vae.name, vae)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", vae.prior())
                pyro.sample("x", vae.likelihood(z * math.nan if broken[0] else z), obs=x)

        def spoil(history: History) -> None:
            broken[0] = len(history) == break_at

        x = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
        train(model, vae.guide, x, epochs=4, batch_size=16, callbacks=[spoil], checkpoint=tmp_path / name, **options)
        return stored()

    whole = run("whole")
    with pytest.raises(FloatingPointError, match=r'at step 7 \(epoch 3\): the .* of site "x" in the model is nan'):
        run("parts", break_at=2)
    broken[0] = False
    state = read_checkpoint(tmp_path / "parts")
    assert len(state["history"]) <= 2
    assert_same(run("parts", resume=True), whole)


# Checkpoints that are refused.


def test_a_checkpoint_is_not_overwritten(tmp_path):
    path = tmp_path / "run"
    stateful_run(3, 1, *STATES["RMSprop"], checkpoint=path)
    content = path.read_bytes()
    for existing in (path, tmp_path):
        with pytest.raises(FileExistsError, match=f"{existing} .*resume=True"):
            stateful_run(3, 2, *STATES["RMSprop"], checkpoint=existing)
    path_of_text = tmp_path / "text"
    path_of_text.write_text("precious")
    with pytest.raises(FileExistsError):
        stateful_run(3, 2, *STATES["RMSprop"], checkpoint=path_of_text)
    with pytest.raises(ValueError, match=str(path_of_text)):
        stateful_run(3, 2, *STATES["RMSprop"], checkpoint=path_of_text, resume=True)
    assert path.read_bytes() == content and path_of_text.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "text"]


def plain_vae() -> VAE:
    """Like `stateful_vae`, with batch normalisation that has weights but no running statistics."""
    vae = stateful_vae()
    vae.encoder.network[1] = nn.BatchNorm1d(8, track_running_stats=False)
    return vae


OTHERS = {
    "another width": ({"make": partial(stateful_vae, width=9)}, "another model"),
    "another part": (
        {"make": lambda: VAE(StandardNormal(2), Normal(2, 16, SMALL), stateful_vae().encoder)},
        "another model",
    ),
    "other buffers": ({"make": plain_vae}, "another model"),
    "fewer data": ({"size": 20}, "data and batch size"),
    "another batch size": ({"batch_size": 8}, "data and batch size"),
    "a schedule": ({"scheduler": partial(StepLR, step_size=2)}, "scheduler"),
    "an average": ({"ema_decay": 0.9}, "ema_decay is 0.9, but the checkpoint was written with None"),
    "another optimizer": ({"optimizer": partial(SGD, lr=0.1, momentum=0.9)}, "optimizer"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, kind):
    path, (other, match) = tmp_path / "run", OTHERS[kind]
    grey = torch.rand(40, 16).round()

    def run(make=stateful_vae, size=40, **options: Any) -> None:
        vae = make()
        before = {name: t.clone() for name, t in vae.state_dict().items()}
        try:
            train(vae.model, vae.guide, grey[:size], **({"epochs": 3, "batch_size": 16, "checkpoint": path} | options))
        except ValueError:
            assert_same(dict(vae.state_dict()), before)  # the model is left as it was
            raise

    run(epochs=2)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        run(resume=True, **other)
    assert path.read_bytes() == content
    run(resume=True)


def test_a_checkpoint_that_cannot_be_written_shows_before_training(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    for path in (tmp_path / "file" / "run", tmp_path / "file" / "folder" / "run", Path("/proc/run")):
        vae = normal_vae()
        refused(OSError, f"cannot write {path}: ", vae.model, vae.guide, torch.randn(40, 4), checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("written", [0, 1], ids=["in the first write", "in the last write"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, failing, written):
    path = tmp_path / "run"
    stateful_run(3, 2, *STATES["RMSprop"], checkpoint=path)
    before = read_checkpoint(path)
    genuine, calls = getattr(os, failing), itertools.count()

    def fail(*args: Any) -> None:
        if next(calls) >= written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match=f"cannot write {path}: No space left on device") as caught:
            stateful_run(99, 3, *STATES["RMSprop"], checkpoint=path, resume=True)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert_same(read_checkpoint(path), before)
    whole, _ = stateful_run(3, 3, *STATES["RMSprop"])
    resumed, _ = stateful_run(99, 3, *STATES["RMSprop"], checkpoint=path, resume=True)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_history_entries_that_a_checkpoint_can_keep(tmp_path):
    """Entries of callbacks, including NumPy's and torch's numbers, are in the history after a resume."""

    def note(history: History) -> None:
        history.records[-1].update(plain=0.5, numpy=np.float32(0.5), torch=torch.tensor(0.5))

    stopping(epochs=2, callbacks=[note], checkpoint=tmp_path / "run")
    pyro.clear_param_store()
    history = stopping(epochs=2, checkpoint=tmp_path / "run", resume=True)
    for name in ("plain", "numpy", "torch"):
        assert [float(value) for value in history[name]] == [0.5, 0.5]


class Counting(nn.Module):
    """A VAE whose model and guide change numbers, buffers, a tensor and the states of random generators."""

    def __init__(self):
        super().__init__()
        self.calls, self.generator = 0, torch.Generator().manual_seed(3)
        self.other = np.random.default_rng(3)
        self.seen: list[float] = []
        self.plain = torch.zeros(())
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("anew", torch.zeros(3))
        self.decoder, self.encoder = nn.Linear(2, 3), nn.Linear(3, 4)

    def model(self, x):
        pyro.module("counting", self)
        self.calls += 1
        self.plain += 1
        self.anew = 0.9 * self.anew + 0.1 * x.mean(0)
        with torch.no_grad():
            self.in_place.mul_(0.9).add_(0.1 * x.mean(0))
        noise = torch.rand(3, generator=self.generator) + random.random() + np.random.rand() + self.other.random()
        if torch.is_grad_enabled():
            self.seen.append(noise.sum().item())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + self.in_place + self.anew + 0.1 * noise
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("counting", self)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


@pytest.mark.parametrize("compile", ["auto", False])
def test_checks_before_training_change_nothing_that_the_model_changes(compile):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)) + 1
    found = []
    for by_svi in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = Counting()
        random.seed(5)
        np.random.seed(5)
        if by_svi:
            svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
            for _ in range(6):
                svi.step(x)
        else:
            sgd = partial(torch.optim.SGD, lr=20 * 1e-3)  # the loss is that of a datum
            fit(vae.model, vae.guide, x, epochs=6, batch_size=20, optimizer=sgd, compile=compile, progress=False)
        found.append([vae.calls, float(vae.plain), vae.in_place, vae.anew, torch.tensor(vae.seen[-3:])])
    assert found[0][:2] == found[1][:2] == [6, 6.0]
    for expected, got in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(got, expected)


class Calls:
    n = 0


CALLS = {"n": 0, "mean": torch.zeros(()), "ratio": 0.5}


@pytest.mark.parametrize("compile", ["auto", False])
def test_checks_change_no_number_wherever_the_model_keeps_it(compile):
    class Slotted:
        __slots__ = ("n",)

    def trained() -> list:
        nonlocal calls
        pyro.clear_param_store()
        CALLS.update(n=0, mean=torch.zeros(()), ratio=0.5)
        Calls.n, calls, slotted.n = 0, 0, 0
        seen.clear(), recent.clear()
        recent.append(torch.zeros(()))
        fit(model, lambda x: None, torch.arange(12.0), epochs=6, batch_size=4, compile=compile, progress=False)
        return [CALLS["n"], Calls.n, calls, slotted.n, len(seen), len(recent), CALLS["mean"].item(), CALLS["ratio"]]

    calls, slotted, seen, recent = 0, Slotted(), [], deque(maxlen=5)

    def model(x):
        nonlocal calls
        loc = pyro.param("loc", torch.zeros(()))
        CALLS["n"] += 1
        CALLS["mean"] = 0.5 * CALLS["mean"] + 1
        CALLS["ratio"] *= 0.5
        Calls.n += 1
        calls += 1
        slotted.n += 1
        seen.append(len(x))
        recent.append(x.mean())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + recent[0], 1.0), obs=x)

    steps = 18
    assert trained() == [*[steps] * 5, 5, sum(0.5**i for i in range(steps)), 0.5 ** (steps + 1)]


@pytest.mark.parametrize("compile", ["auto", False])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_parameter_that_comes_later_is_not_left_out_without_a_word(compile, has_gradient):
    def model(x, y):
        loc = pyro.param("loc", torch.zeros(()))
        if bool((y == 1).any()):
            loc = loc + pyro.param("rare", torch.zeros(())) * y
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def train_on(y: Tensor) -> None:
        loader = DataLoader(TensorDataset(torch.ones(12), y), batch_size=4)  # in order
        fit(model, lambda x, y: None, loader, epochs=2, compile=compile, progress=False)

    y = torch.zeros(12)
    for at in (0, 6):
        y[:] = 0
        y[at] = 1
        pyro.clear_param_store()
        other, rare = (pyro.param(name, torch.zeros(())) for name in ("of another model", "rare"))
        if has_gradient:
            (other + rare).backward()
        if at == 0:
            train_on(y)
            assert rare.item() != 0
        else:
            with pytest.raises(
                ValueError, match="parameter 'rare' has a gradient at step 2, but the first batch did not"
            ):
                train_on(y)


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "not enabled"])
def test_a_guide_that_takes_a_gradient_says_so(enabled):
    network = nn.Linear(3, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z, z[..., :1]], -1), 1.0).to_event(1), obs=x)

    def guide(x):  # a step downhill from what a network says
        pyro.module("network", network)
        with torch.set_grad_enabled(enabled or torch.is_grad_enabled()):
            z = network(x)
            (slope,) = torch.autograd.grad(z.square().sum(), z, create_graph=True)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(z - 0.1 * slope, 1.0).to_event(1))

    if enabled:
        assert len(fit(model, guide, torch.randn(8, 3), epochs=2, progress=False)) == 2
    else:
        with pytest.raises(ValueError, match="guide takes a gradient .* Take it inside of `with torch.enable_grad"):
            fit(model, guide, torch.randn(8, 3), epochs=2, progress=False)


def test_lazy_modules_are_trained():
    network = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z, z[..., :1]], -1), 1.0).to_event(1), obs=x)

    def guide(x):
        loc, scale = network(x).chunk(2, -1)  # the first call makes the parameters
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    assert len(fit(model, guide, torch.randn(8, 3), epochs=2, compile=False, progress=False)) == 2


def test_a_run_that_diverges_says_so():
    vae, x = normal_vae(), torch.randn(40, 4)
    rates = partial(LambdaLR, lr_lambda=lambda epoch: 1.0 if epoch < 6 else 1e4)
    with pytest.warns(UserWarning, match=r"the loss of epoch \d is .* the run has diverged. Clip gradients"):
        train(vae.model, vae.guide, x, epochs=8, batch_size=10, scheduler=rates)
    for _ in range(2):  # neither an ordinary run, nor its end
        vae = normal_vae()
        train(vae.model, vae.guide, x, epochs=12, batch_size=10)
