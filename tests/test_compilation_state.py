"""No graph freezes what may change: settings, weights, modes, schedules and noise."""

import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pytest
import torch
from compiling import (
    Pair,
    doubles,
    fresh,
    linear,
    normalised,
    pair_of,
    refused,
    same,
    same_compiled,
    small_vae,
    trained,
)
from linear_gaussian import diagonal_vae
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyrovae import bounds, fit
from pyrovae import compile as compiled
from pyrovae.compilation import cache

fit = partial(fit, progress=False)


class Changing(NamedTuple):
    """A pair, what changes something that its loss depends on, and whether the same graph serves after the change."""

    pair: Pair
    change: Callable[[], Any]
    same_graph: bool = False


class Scaled(nn.Linear):
    """A layer whose output is multiplied by numbers from many places."""

    of_class = 1.0

    def __init__(self):
        super().__init__(2, 3)
        self.factor, self.on, self.options = 1.0, True, {"factor": 1.0, "list": [1.0, (1.0,)]}

    @property
    def squared(self) -> float:
        return self.factor**2

    def forward(self, z):
        out = super().forward(z) * self.factor * self.squared * self.of_class
        out = out * self.options["factor"] * self.options["list"][0] * self.options["list"][1][0]
        return out if self.on else -out


def of_layer(change: Callable[[Scaled], Any]) -> Callable[[], Changing]:
    def make() -> Changing:
        layer = Scaled().double()
        return Changing(linear(decoder=layer), lambda: change(layer))

    return make


FACTOR = 1.0
SETTINGS, PACKAGE = types.ModuleType("settings"), types.ModuleType("package")


def of_global() -> Changing:
    globals()["FACTOR"] = 1.0
    return Changing(linear(lambda: FACTOR), lambda: globals().update(FACTOR=2.0))


def read_by_another() -> float:
    return FACTOR


def of_global_of_a_function_called() -> Changing:
    globals()["FACTOR"] = 1.0
    return Changing(linear(lambda: read_by_another()), lambda: globals().update(FACTOR=2.0))


def of_a_module_of_settings() -> Changing:
    SETTINGS.factor = 1.0
    return Changing(linear(lambda: SETTINGS.factor), lambda: setattr(SETTINGS, "factor", 2.0))


def of_closure() -> Changing:
    factor = 1.0

    def change():
        nonlocal factor
        factor = 2.0

    return Changing(linear(lambda: factor), change)


def of_default() -> Changing:
    def factor(by=1.0):
        return by

    return Changing(linear(factor), lambda: setattr(factor, "__defaults__", (2.0,)))


def of_keyword_default() -> Changing:
    def factor(*, by=1.0):
        return by

    return Changing(linear(factor), lambda: factor.__kwdefaults__.update(by=2.0))


def of_partial() -> Changing:
    numbers = [1.0]
    return Changing(linear(partial(lambda held: held[0], numbers)), lambda: numbers.__setitem__(0, 2.0))


class Held:
    """A plain object, called."""

    def __init__(self):
        self.factor = 1.0

    def __call__(self) -> float:
        return self.factor

    def method(self) -> float:
        return self.factor


def of_object(called: bool) -> Callable[[], Changing]:
    def make() -> Changing:
        held = Held()
        return Changing(linear(held if called else held.method), lambda: setattr(held, "factor", 2.0))

    return make


def of_flag() -> Changing:
    held = types.SimpleNamespace(on=False)
    return Changing(linear(lambda: 2.0 if held.on else 1.0), lambda: setattr(held, "on", True))


def of_tensor(in_place: bool) -> Callable[[], Changing]:
    def make() -> Changing:
        factor = torch.tensor(1.0).double()

        def change():
            nonlocal factor
            if in_place:
                factor.fill_(2.0)
            else:
                factor = torch.tensor(2.0).double()

        return Changing(linear(lambda: factor), change, same_graph=in_place)

    return make


def one_more() -> Tensor:
    """A parameter in Pyro's store: without any, Pyro's ELBO has no gradient."""
    return pyro.param("one more", torch.tensor(1.0).double())


def of_new_parameter() -> Changing:
    decoder = nn.Linear(2, 3).double()

    def change():
        decoder.weight = nn.Parameter(2 * decoder.weight.detach())

    return Changing(linear(one_more, decoder, registered=False), change)


def of_new_layer() -> Changing:
    decoder = nn.Sequential(nn.Linear(2, 3)).double()

    def change():
        decoder[0] = nn.Linear(2, 3).double()

    return Changing(linear(one_more, decoder, registered=False), change)


def of_state_dict() -> Changing:
    pair = linear()
    state = {name: 2 * t for name, t in pair.modules[0].state_dict().items()}
    return Changing(pair, lambda: pair.modules[0].load_state_dict(state), same_graph=True)


def of_parameter_store() -> Changing:
    pair = linear(lambda: pyro.param("factor", torch.tensor(1.0).double()))

    def change():
        pyro.clear_param_store()
        pyro.param("factor", torch.tensor(2.0).double())

    return Changing(pair, change)


def of_parameter_set_again() -> Changing:
    pair = linear(lambda: pyro.param("factor", torch.tensor(1.0).double(), constraint=constraints.positive))

    def change():
        pyro.get_param_store()["factor"] = torch.tensor(2.0).double()

    return Changing(pair, change)


class Namespace:
    """Settings as a class without instances."""

    factor = 1.0


@dataclass(slots=True)
class Slots:
    factor: float = 1.0


class Described(nn.Linear):
    """A layer that reads an optional attribute, and attributes of its class."""

    shared = {"factor": 1.0}
    tensor = torch.tensor(1.0).double()

    def forward(self, z):
        return super().forward(z) * getattr(self, "extra", 1.0) * self.shared["factor"] * self.tensor


def described(change: Callable[[Described], Any]) -> Callable[[], Changing]:
    def make() -> Changing:
        layer = Described(2, 3).double()
        Described.tensor = torch.tensor(1.0).double()
        Described.shared["factor"] = 1.0
        return Changing(linear(decoder=layer), lambda: change(layer))

    return make


def of_a_class() -> Changing:
    Namespace.factor = 1.0
    return Changing(linear(lambda: Namespace.factor), lambda: setattr(Namespace, "factor", 2.0))


def of_slots() -> Changing:
    held = Slots()
    return Changing(linear(lambda: held.factor), lambda: setattr(held, "factor", 2.0))


def of_a_module_held() -> Changing:
    held, SETTINGS.factor = SETTINGS, 1.0
    return Changing(linear(lambda: held.factor), lambda: setattr(SETTINGS, "factor", 2.0))


def of_a_module_of_a_package() -> Changing:
    PACKAGE.settings, SETTINGS.factor = SETTINGS, 1.0
    return Changing(linear(lambda: PACKAGE.settings.factor), lambda: setattr(SETTINGS, "factor", 2.0))


def of_an_import_inside() -> Changing:
    def factor() -> float:
        import settings_for_tests

        return settings_for_tests.factor

    SETTINGS.factor = 1.0
    sys.modules["settings_for_tests"] = SETTINGS
    return Changing(linear(factor), lambda: setattr(SETTINGS, "factor", 2.0))


def of_what_is_cached(maxsize: int | None) -> Callable[[], Changing]:
    def make() -> Changing:
        @lru_cache(maxsize)
        def settings() -> types.SimpleNamespace:
            return types.SimpleNamespace(factor=1.0)

        return Changing(linear(lambda: settings().factor), lambda: setattr(settings(), "factor", 2.0))

    return make


def of_an_attribute_of_a_function() -> Changing:
    def factor() -> float:
        return factor.by

    factor.by = 1.0
    return Changing(linear(factor), lambda: setattr(factor, "by", 2.0))


def of_a_queue() -> Changing:
    last = deque([1.0], maxlen=1)
    return Changing(linear(lambda: last[0]), lambda: last.append(2.0))


def of_a_handler_inside() -> Changing:
    pair, handler = linear(), poutine.scale(scale=1.0)
    return Changing(pair._replace(model=handler(pair.model)), lambda: setattr(handler, "scale", 2.0))


def of_conditioned_data() -> Changing:
    pair, data = linear(lambda: pyro.sample("s", dist.Normal(0.0, 1.0))), {"s": torch.tensor(1.0).double()}
    model = poutine.condition(pair.model, data=data)
    return Changing(pair._replace(model=model), lambda: data.update(s=torch.tensor(2.0).double()))


def of_a_hook() -> Changing:
    decoder, numbers = nn.Linear(2, 3).double(), [1.0]
    decoder.register_forward_hook(lambda module, given, out: numbers[0] * out)
    return Changing(linear(decoder=decoder), lambda: numbers.__setitem__(0, 2.0))


def of_a_hook_of_gradients() -> Changing:
    decoder = nn.Linear(2, 3).double()
    return Changing(linear(decoder=decoder), lambda: decoder.weight.register_hook(lambda gradient: 0.1 * gradient))


CHANGES = {
    "class of settings": of_a_class,
    "slots": of_slots,
    "module of settings that is held": of_a_module_held,
    "module of settings in a package": of_a_module_of_a_package,
    "module that is imported inside": of_an_import_inside,
    "dictionary of a class": described(lambda layer: Described.shared.update(factor=2.0)),
    "tensor of a class": described(lambda layer: setattr(Described, "tensor", torch.tensor(2.0).double())),
    "new attribute": described(lambda layer: setattr(layer, "extra", 2.0)),
    "new buffer": described(lambda layer: layer.register_buffer("extra", torch.tensor(2.0).double())),
    "attribute of a function": of_an_attribute_of_a_function,
    "what a cache keeps": of_what_is_cached(8),
    "what a cache without end keeps": of_what_is_cached(None),
    "queue": of_a_queue,
    "handler inside": of_a_handler_inside,
    "conditioned data": of_conditioned_data,
    "hook": of_a_hook,
    "hook of gradients": of_a_hook_of_gradients,
    "attribute": of_layer(lambda layer: setattr(layer, "factor", 2.0)),
    "flag of a module": of_layer(lambda layer: setattr(layer, "on", False)),
    "class attribute": of_layer(lambda layer: setattr(Scaled, "of_class", 2.0)),
    "dictionary": of_layer(lambda layer: layer.options.update(factor=2.0)),
    "list": of_layer(lambda layer: layer.options["list"].__setitem__(0, 2.0)),
    "tuple": of_layer(lambda layer: layer.options["list"].__setitem__(1, (2.0,))),
    "global": of_global,
    "global of a function called": of_global_of_a_function_called,
    "module of settings": of_a_module_of_settings,
    "closure": of_closure,
    "default": of_default,
    "keyword default": of_keyword_default,
    "partial": of_partial,
    "called object": of_object(called=True),
    "method": of_object(called=False),
    "flag": of_flag,
    "tensor in place": of_tensor(in_place=True),
    "another tensor": of_tensor(in_place=False),
    "new parameter": of_new_parameter,
    "new layer": of_new_layer,
    "load_state_dict": of_state_dict,
    "clear_param_store": of_parameter_store,
    "parameter set again": of_parameter_set_again,
}


@pytest.fixture(autouse=True)
def class_attributes_as_they_were(monkeypatch):
    monkeypatch.setattr(Scaled, "of_class", 1.0)


def assert_seen(make: Callable[[], Changing]) -> None:
    """Asserts that the next step sees a change, at a call without a comparison."""
    x, found = doubles(5, 3), []
    for wrap, changes in ((lambda elbo: elbo, True), (compiled, True), (lambda elbo: elbo, False)):
        Scaled.of_class = 1.0
        case, elbo = fresh(make), wrap(Trace_ELBO())
        found.append(trained(elbo, case.pair, x, steps=3, change=lambda step: step == 2 and changes and case.change()))
    same(found[1], found[0])
    # The change makes a difference.
    assert any(a is None or not torch.equal(a, b) for a, b in zip(found[2], found[0], strict=True) if b is not None)


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_at_once(make, traced):
    assert_seen(make)
    assert traced.made == (1 if make().same_graph else 2)


def test_a_former_state_needs_no_new_graph(traced):
    case = of_flag()
    held = next(c.cell_contents for c in case.change.__closure__ if isinstance(c.cell_contents, types.SimpleNamespace))
    elbo, x = compiled(bounds.ELBO()), doubles(5, 3)
    for step in range(12):
        held.on = step % 2 == 1
        elbo.terms(case.pair.model, case.pair.guide, x)
    assert traced.made == 2


def test_frozen_weights_get_no_gradient(traced):
    def change(layer: nn.Linear, step: int) -> None:
        if step in (2, 4):
            layer.weight.requires_grad_(step == 4)

    found = []
    for wrap in (lambda elbo: elbo, compiled):
        pair = fresh(lambda: linear(registered=False))
        steps = partial(change, pair.modules[0])
        found.append(trained(wrap(bounds.IWAE(3)), pair, doubles(5, 3), steps=7, change=steps))
    same(found[1], found[0])
    assert any(t is None for t in found[0])
    assert traced.made == 2


def test_another_dtype_gets_another_graph(traced, at_once):
    found = []
    for wrap in (lambda elbo: elbo, compiled):
        vae, elbo = fresh(lambda: diagonal_vae(2, 3).float()), wrap(bounds.IWAE(3))
        first = trained(elbo, pair_of(vae), doubles(5, 3).float(), steps=2)
        found.append([*first, *trained(elbo, pair_of(vae.double()), doubles(5, 3), steps=3)])
    same(found[1], found[0])
    assert {t.dtype for t in found[0] if t is not None} >= {torch.float32, torch.float64}
    assert traced.made == 2


def test_another_shape_runs_eagerly_at_first(traced, monkeypatch):
    monkeypatch.setattr(cache, "_WARMUP_CALLS", 3)
    found, x = [], doubles(8, 3)
    for wrap in (lambda elbo: elbo, compiled):
        pair, elbo, made = fresh(lambda: pair_of(diagonal_vae(2, 3))), wrap(bounds.ELBO(2)), []
        found.append([])
        for size in (8, 5, 8, 5, 5, 5, 8, 5, 1, 8):
            found[-1] += trained(elbo, pair, x[:size], steps=1)
            made.append(traced.made)
    same(found[1], found[0])
    assert made == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]


def test_a_resumed_run_compiles_at_the_same_steps(traced, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_WARMUP_CALLS", 3)
    x, made = doubles(12, 3), []
    for epochs in (2, 3, 4):  # of two batches, the last one smaller
        pair = fresh(linear)
        fit(*pair[:2], x, epochs=epochs, batch_size=8, compile=True, checkpoint=tmp_path / "run", resume=epochs > 2)
        made.append(traced.made)
    assert made == [1, 2, 4]  # the fourth small batch is the first call of its process: a graph at once


class Steep(bounds.Schedule):
    """A schedule that a user wrote."""

    span = 5

    def __call__(self, step: int | None) -> float:
        return 1.0 if step is None else 1 - 0.5**step


class Growing(bounds.Penalty):
    """A penalty that computes with the step."""

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        return kl * (1.0 if step is None else 1 / (step + 1))


class OfSteps(bounds.Penalty):
    """A penalty with a schedule where a bound does not look for one."""

    def __init__(self):
        self.held = [Steep()]

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        return kl * bounds.schedules.value_at(self.held[0], step)


SCHEDULES = {
    "Linear": lambda: bounds.ELBO(beta=bounds.Linear(steps=6)),
    "Cyclical": lambda: bounds.ELBO(beta=bounds.Cyclical(period=4, start=0.5)),
    "Capacity": lambda: bounds.ELBO(beta=3.0, penalty=bounds.Capacity(bounds.Linear(steps=8, end=4.0))),
    "both": lambda: bounds.ELBO(beta=bounds.Linear(steps=4), penalty=bounds.Capacity(bounds.Cyclical(4, end=4.0))),
    "a user's": lambda: bounds.ELBO(beta=Steep(), penalty=bounds.FreeBits(0.2)),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_continue_in_one_graph(make, traced):
    elbo = same_compiled(make, lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3), steps=10)
    assert (traced.made, elbo.elbo.steps) == (1, 10)


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Growing, "computes with the training step"), (OfSteps, "is not an attribute of the bound")],
    ids=["step", "hidden"],
)
def test_a_penalty_that_computes_with_the_step_is_not_compiled(make, reason, traced):
    with refused(reason):
        elbo = same_compiled(
            lambda: bounds.ELBO(penalty=make()), lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3), steps=5
        )
    assert (traced.made, elbo.elbo.steps) == (0, 5)


def test_train_and_eval_mode_and_running_statistics(traced):
    def change(pair: Pair, step: int) -> None:
        pair.modules[0].train(step % 4 < 2)

    found = []
    for wrap in (lambda elbo: elbo, compiled):
        pair = fresh(normalised)
        found.append(trained(wrap(Trace_ELBO()), pair, doubles(6, 3), steps=10, change=partial(change, pair)))
    same(found[1], found[0])  # buffers and the number of batches among it
    assert pair.modules[0][1].num_batches_tracked == 6
    assert traced.made == 2


def test_noise_follows_the_random_state(traced):
    pair, x = fresh(normalised), doubles(6, 3)
    elbo = compiled(Trace_ELBO())

    def losses(seed: int) -> list[float]:
        pyro.set_rng_seed(seed)
        return [elbo.loss_and_grads(pair.model, pair.guide, x).item() for _ in range(6)]

    first = losses(1)
    assert len(set(first)) == 6
    assert losses(1) == first
    assert not set(losses(2)) & set(first)


def test_masks_of_dropout_differ_from_call_to_call(traced):
    # Whatever the latents, the layer that is masked gives ones, and gradients by hidden elements are zero.
    network = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    nn.init.zeros_(network[0].weight)
    nn.init.ones_(network[0].bias)
    pair, elbo, gradients = linear(decoder=network), compiled(Trace_ELBO()), []
    for _ in range(6):
        network.zero_grad()
        elbo.loss_and_grads(pair.model, pair.guide, doubles(1, 3))
        gradients.append(network[2].weight.grad == 0)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(gradients, 2))


def test_compilation_has_the_effects_of_one_step(traced):
    # Random states, buffers, gradients and the parameter store are those after an eager step.
    found = []
    for wrap in (lambda elbo: elbo, compiled):
        pair, elbo = fresh(normalised), wrap(Trace_ELBO())
        elbo.loss_and_grads(pair.model, pair.guide, doubles(6, 3))
        assert len(pyro.get_param_store()) == 6
        state = [*pair.modules[0].state_dict().values(), *(p.grad for p in pair.parameters()), torch.get_rng_state()]
        found.append(
            [*state, torch.tensor(random.getstate()[1]), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
        )
    same(found[1], found[0])


@pytest.mark.parametrize("scales", [(0.5, 0.5, 2.0, 0.5), (1.0, 3.0, 3.0, 1.0)], ids=str)
def test_scales_around(scales, traced, monkeypatch):
    monkeypatch.setattr(cache, "_WARMUP_CALLS", 0)
    x, found = doubles(5, 3), []
    for wrap in (lambda elbo: elbo, compiled):
        pair, elbo = fresh(linear), wrap(bounds.IWAE(3))
        found.append([])
        for scale in scales:
            with poutine.scale(scale=scale):
                found[-1] += trained(elbo, pair, x, steps=1)
    same(found[1], found[0])
    assert traced.made == len(set(scales))


def test_inside_handlers_with_other_state_nothing_is_compiled(traced):
    pair, x = fresh(linear), doubles(5, 3)
    with poutine.block(hide=["nothing"]):
        expected = trained(Trace_ELBO(), pair, x, steps=2)
        pair = fresh(linear)
        with refused("it runs inside BlockMessenger"):
            same(trained(compiled(Trace_ELBO()), pair, x, steps=2), expected)
    assert traced.made == 0


def test_autocast_and_default_types_are_inputs(traced, monkeypatch):
    monkeypatch.setattr(cache, "_WARMUP_CALLS", 0)

    def steps(elbo: Any) -> list:
        pair, x, found = pair_of(fresh(small_vae)), doubles(5, 3).float(), []
        for on in (False, True, True, False, True):
            # A new region for each step: no cache of old weights.
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                found += trained(elbo, pair, x, steps=1)
        torch.set_default_dtype(torch.float64)
        try:
            found += trained(elbo, pair, x, steps=1)
        finally:
            torch.set_default_dtype(torch.float32)
        return found

    same(steps(compiled(bounds.ELBO(4))), steps(bounds.ELBO(4)))
    assert traced.made == 3


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_outside_of_training_sees_the_current_weights(compile, traced):
    def train(loss: bounds.ELBO, outside: Any) -> list[Tensor]:
        vae = fresh(small_vae)
        with outside:
            history = fit(
                vae.model,
                vae.guide,
                3 + doubles(24, 3).float(),
                loss=loss,
                epochs=4,
                batch_size=8,
                compile=compile,
                optimizer=partial(torch.optim.SGD, lr=0.02),
            )
        assert history["loss"][-1] < 0.9 * history["loss"][0]
        return [torch.tensor(history["loss"]), *(p.detach() for p in vae.parameters())]

    class CastsInEachStep(bounds.ELBO):
        """Casts weights again in every step."""

        def terms(self, *args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().terms(*args, **kwargs)

    found = train(bounds.ELBO(), torch.autocast("cpu", torch.bfloat16))
    same(found, train(CastsInEachStep(), nullcontext()))
    assert traced.made == 2 * compile
