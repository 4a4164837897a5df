"""What cannot be compiled runs eagerly, with one warning; what a graph computes wrongly is found."""

import io
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from cases import SMALL
from compiling import FETCHED, Pair, doubles, fresh, linear, pair_of, refused, same, same_compiled, trained
from linear_gaussian import diagonal_vae
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrovae import VAE, bounds, encoders, fit, likelihoods, priors
from pyrovae import compile as compiled
from pyrovae.compilation import tracing

fit = partial(fit, progress=False)


def fetching() -> Pair:
    held = {}

    def factor() -> float:
        return 2.0 if held["layer"].weight.sum() > 0 else 1.0

    pair = linear(factor)
    held["layer"] = pair.modules[0]
    return pair


def counting() -> Pair:
    calls = []

    def factor() -> float:
        calls.append(1)
        return 1.0 + 0.1 * len(calls)

    return linear(factor)


def printing() -> Pair:
    return linear(lambda: print("called") or random_factor())


def random_factor() -> Tensor:
    return torch.rand((), dtype=torch.float64)


def reading_an_iterator() -> Pair:
    numbers = iter(range(1, 1000))
    return linear(lambda: 1.0 + 0.1 * next(numbers))


def reading_a_file() -> Pair:
    file = io.StringIO("12\n3\n1234\n" * 100)
    return linear(lambda: 1.0 + 0.1 * len(file.readline()) + random_factor())


def counting_with_a_tensor() -> Pair:
    calls = torch.zeros((), dtype=torch.float64)
    return linear(lambda: 1.0 + 0.1 * calls.add_(1.0))


REFUSED = {
    "value of a tensor": (fetching, FETCHED),
    "counted calls": (counting, "a run changes what the next one reads"),
    "counted calls in a tensor": (counting_with_a_tensor, "it changes a tensor in place that is not a buffer"),
    "printing": (printing, "it prints"),
    "iterator": (reading_an_iterator, "it can reach .*, a range_iterator"),
    "file": (reading_a_file, "it can reach .*, a StringIO"),
    "random": (lambda: linear(lambda: 1 + random.random()), "random numbers of Python or NumPy"),
    "numpy.random": (lambda: linear(lambda: 1 + np.random.rand()), "random numbers of Python or NumPy"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compiled_runs_with_one_warning(make, reason, traced):
    pair, elbo = fresh(make), compiled(Trace_ELBO())
    with refused(reason) as warned:
        losses = [elbo.loss_and_grads(pair.model, pair.guide, doubles(5, 3)) for _ in range(5)]
    assert warned[0].filename == __file__  # the user's own line
    assert traced.made == 0
    assert len(set(map(float, losses))) == 5


def test_a_refused_loss_is_the_eager_one(traced):
    with refused(FETCHED):
        same_compiled(Trace_ELBO, fetching, doubles(5, 3))


def test_an_argument_that_requires_a_gradient_is_not_compiled(traced):
    found = []
    with refused("an argument requires a gradient"):
        for wrap in (lambda elbo: elbo, compiled):
            pair, x = fresh(linear), doubles(5, 3).requires_grad_()
            found.append([*trained(wrap(Trace_ELBO()), pair, x), x.grad])
    same(found[1], found[0])


@pytest.mark.parametrize(
    "error", [RuntimeError("no C++ compiler\nwas found"), torch._dynamo.exc.TorchRuntimeError("none")], ids=str
)
@pytest.mark.parametrize("later", [False, True])
def test_a_compiler_that_fails_gives_one_warning(error, later, monkeypatch):
    def fail(*given):
        raise error

    monkeypatch.setattr(tracing, "compile_module", (lambda module: fail) if later else fail)
    with refused("no code could be made of its graph: .*(no C|none)"):
        same_compiled(bounds.ELBO, lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3))


def test_state_that_changes_too_often_is_named(traced):
    found, held, x = [], [0.0], doubles(5, 3)
    with refused(r"held\[0\] changed from \d.0 to 4.0, and there are 4 graphs for earlier values"):
        for wrap in (lambda elbo: elbo, compiled):
            pair = fresh(lambda: linear(lambda: held[0]))
            change = partial(held.__setitem__, 0)
            found.append(trained(wrap(Trace_ELBO()), pair, x, steps=11, change=lambda step: change(float(step))))
    same(found[1], found[0])
    assert traced.made == 4


def test_a_number_that_differs_in_each_call_is_named(traced):
    def pair() -> Pair:
        layer = nn.Linear(2, 3).double()

        def model(x, factor):
            pyro.module("layer", layer)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(factor * layer(z), 1.0).to_event(1), obs=x)

        guide = linear().guide
        return Pair(model, lambda x, factor: guide(x), [layer])

    found = []
    with refused("is a new value, and there are graphs for 4 earlier values"):
        for wrap in (lambda elbo: elbo, compiled):
            made, elbo = fresh(pair), wrap(Trace_ELBO())
            found.append([t for step in range(12) for t in trained(elbo, made, doubles(5, 3), step / 10, steps=1)])
    same(found[1], found[0])
    assert traced.made == 1  # the others run eagerly at first


@pytest.mark.parametrize("generator", [torch.Generator, lambda: np.random.default_rng(0)], ids=["torch", "numpy"])
def test_other_generators_are_refused(generator, traced):
    def make() -> Pair:
        drawn_from = generator()

        def factor() -> float | Tensor:
            return 1 + (
                drawn_from.random()
                if isinstance(drawn_from, np.random.Generator)
                else torch.rand((), generator=drawn_from).double()
            )

        return linear(factor)

    pair, elbo = fresh(make), compiled(Trace_ELBO())
    with refused(""):
        losses = [elbo.loss_and_grads(pair.model, pair.guide, doubles(5, 3)) for _ in range(4)]
    assert len(set(map(float, losses))) == 4


def test_sizes_that_depend_on_values_are_refused(traced):
    pair = fresh(linear)

    def model(x):
        pyro.factor("number", torch.tensor(float(len(x[x > 0]))).double())
        pair.model(x)

    x, elbo = doubles(5, 3), compiled(Trace_ELBO())
    with refused(""):
        losses = []
        for given in (x, x, -x):  # the third call makes no comparison
            pyro.set_rng_seed(1)
            losses.append(float(elbo.loss_and_grads(model, pair.guide, given)))
    pyro.set_rng_seed(1)
    assert losses[2] == pytest.approx(Trace_ELBO().loss(model, pair.guide, -x))


@pytest.mark.parametrize("wrong", [2, 3])
def test_a_change_that_no_guard_sees_is_found_at_the_next_comparison(wrong, traced):
    array = np.ones(2000)  # small ones are compared
    pair, x = fresh(lambda: linear(lambda: float(array[0]))), doubles(5, 3)
    elbo = compiled(bounds.ELBO())
    for step in range(1, 5):
        if step == wrong:
            array.fill(1.001)
        if step == {2: 2, 3: 4}[wrong]:
            with pytest.raises(RuntimeError, match="the compiled graph of ELBO disagrees with ELBO itself"):
                elbo.terms(pair.model, pair.guide, x)
            break
        elbo.terms(pair.model, pair.guide, x)


def test_a_wrong_result_of_the_compiler_is_found(monkeypatch):
    def erring(module):
        return lambda *given: [t * (1 + 1e-3) if t.is_floating_point() else t for t in module(*given)]

    monkeypatch.setattr(tracing, "compile_module", erring)
    vae = diagonal_vae(2, 3)
    with pytest.raises(RuntimeError, match="or torch.compile made an error"):
        compiled(bounds.ELBO()).terms(vae.model, vae.guide, doubles(5, 3))


def binary() -> VAE:
    return VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL)
    ).double()


def test_data_outside_of_the_support_are_refused(traced):
    x = (doubles(6, 3) > 0).double()
    vae = fresh(binary)
    elbo = compiled(bounds.ELBO())
    for _ in range(3):
        elbo.terms(vae.model, vae.guide, x)
    bad = x.clone()
    bad[4, 1] = 0.5
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="the first datum outside is row 4 of the batch"),
    ):
        elbo.terms(vae.model, vae.guide, bad)
    elbo.terms(vae.model, vae.guide, x)


class Spoilt:
    """Makes a batch of training unusable in the second epoch."""

    def __init__(self, spoil: Callable[[Tensor], Any]):
        self.calls, self.spoil = 0, spoil

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.clone()
        if self.calls == 7:
            self.spoil(x)
        return x


@pytest.mark.parametrize("what", ["support", "weights"])
def test_fit_raises_the_same_errors(what, traced):
    messages = []
    for compile in (False, True):
        vae = fresh(binary)
        spoil = {
            "support": lambda x: x[2].fill_(0.5),
            "weights": lambda x: vae.encoder.network.layers[0].weight.data.fill_(math.nan),
        }[what]
        kind = {"support": ValueError, "weights": FloatingPointError}[what]
        with pytest.raises(kind) as raised:
            fit(
                vae.model,
                vae.guide,
                (doubles(20, 3) > 0).double(),
                loss=bounds.ELBO(),
                epochs=3,
                batch_size=5,
                transform=Spoilt(spoil),
                compile=compile,
            )
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert {"support": "outside the support of", "weights": "is no longer finite"}[what] in messages[0]
    assert traced.made == 1


def seeding() -> float:
    torch.manual_seed(3)
    return 1.0


def test_a_model_that_seeds_torch_keeps_its_noise(traced):
    with refused("it sets the state of torch's random numbers"):
        same_compiled(Trace_ELBO, lambda: linear(seeding), doubles(5, 3))


def drawing_too_much() -> float:
    torch.randn(3)
    return 1.0


@pytest.mark.parametrize("compile", ["auto", True])
def test_draws_that_nothing_needs_move_the_noise_all_the_same(compile):
    losses = []
    for how in (False, compile):
        pair = fresh(lambda: linear(drawing_too_much))
        pyro.set_rng_seed(0)
        given = {"epochs": 12, "batch_size": 5, "compile": how}
        losses.append(fit(pair.model, pair.guide, doubles(5, 3), **given)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
