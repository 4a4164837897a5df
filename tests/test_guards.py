"""Guards find the state that a function can reach, and name what changed in it."""

import random
import types
from collections import OrderedDict, deque, namedtuple
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.compilation import guards
from pyrovae.compilation.guards import Guards
from pyrovae.inference.messages import Untraceable

Point = namedtuple("Point", "x y")
NUMBER = 1.0


class Plain:
    """An object with an attribute, one of its class and a method that reads a global variable."""

    of_class = 1.0

    def __init__(self, value: Any = 1.0):
        self.value = value

    def method(self) -> float:
        return NUMBER

    @property
    def doubled(self) -> float:
        return 2 * NUMBER


class Derived(Plain):
    pass


def holder(value: Any):
    """Returns functions that read a value and set it."""

    def get():
        return value

    def put(other):
        nonlocal value
        value = other

    return get, put


def tensors_of(*roots: Any) -> set[int]:
    return {id(t) for t in Guards(roots).tensors}


HOLDERS = {
    "itself": lambda t: t,
    "list": lambda t: [1, [t]],
    "tuple": lambda t: (t,),
    "set": lambda t: {t},
    "frozenset": lambda t: frozenset([t]),
    "dictionary": lambda t: {"a": {"b": t}},
    "ordered dictionary": lambda t: OrderedDict(a=t),
    "named tuple": lambda t: Point(t, 1),
    "object": lambda t: Plain(t),
    "derived object": lambda t: Derived([t]),
    "method": lambda t: Plain(t).method,
    "namespace": lambda t: types.SimpleNamespace(t=t),
    "closure": lambda t: holder(t)[0],
    "closure in a closure": lambda t: holder(holder(t)[0])[0],
    "partial": lambda t: partial(print, t),
    "keyword of a partial": lambda t: partial(print, end=t),
    "default": lambda t: lambda x=t: x,
    "keyword default": lambda t: lambda *, x=t: x,
    "buffer": lambda t: with_buffer(t),
}


def with_buffer(t: torch.Tensor) -> nn.Module:
    module = nn.Sequential(nn.Module())
    module[0].register_buffer("t", t)
    return module


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_tensors_are_found_wherever_they_are(hold):
    t = torch.zeros(3)
    snapshot = Guards((hold(t), 3, None))
    assert [id(x) for x in snapshot.tensors] == [id(t)]
    assert snapshot.failure_reason(snapshot.roots) is None
    t += 1
    assert snapshot.failure_reason(snapshot.roots) is None  # its values are an input
    t.requires_grad_()
    assert snapshot.failure_reason(snapshot.roots).endswith("changed its shape, type, device or requires_grad")


def test_parameters_of_networks_are_leaves_and_buffers_are_buffers():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    network[2].bias.requires_grad_(False)
    snapshot = Guards((network,))
    assert {id(t) for t in snapshot.tensors} == {id(t) for t in (*network.parameters(), *network.buffers())}
    assert {id(t) for t in snapshot.buffers} == {id(t) for t in network.buffers()}
    assert {id(t) for t in snapshot.leaves} == {id(t) for t in network.parameters() if t.requires_grad}


def test_tensors_that_are_shared_count_once():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    assert len(Guards((first, second, [first], first)).tensors) == 3


def test_objects_that_hold_each_other_are_visited_once():
    a, b = Plain(), Plain()
    a.value, b.value = [b], {"a": a}
    snapshot = Guards((a,))
    assert snapshot.failure_reason((a,)) is None
    b.value["a"] = b
    assert snapshot.failure_reason((a,)) is not None


def test_parameters_of_the_store_are_found_by_name():
    first, other = (pyro.param(name, torch.zeros(2)).unconstrained() for name in ("first", "other"))
    snapshot = Guards((), ("first",))
    assert [id(t) for t in snapshot.tensors] == [id(first)]
    pyro.get_param_store()["other"] = torch.ones(2)
    assert snapshot.failure_reason(()) is None
    pyro.get_param_store()["first"] = torch.ones(2)
    assert snapshot.failure_reason(()) == "pyro.param.first changed"
    assert id(other) != id(first)


NETWORK = partial(nn.Sequential, nn.Linear(2, 2), nn.Dropout(0.1))
MESSAGES = {
    "attribute": (Plain, lambda x: setattr(x, "value", 2.0), "Plain.value changed from 1.0 to 2.0"),
    "type": (Plain, lambda x: setattr(x, "value", 1), "Plain.value changed from 1.0 to 1"),
    "object": (Plain, lambda x: setattr(x, "value", Plain()), "Plain.value changed"),
    "to None": (Plain, lambda x: setattr(x, "value", None), "Plain.value changed from 1.0 to None"),
    "new attribute": (
        Plain,
        lambda x: setattr(x, "other", 2.0),
        "the number of attributes of Plain changed from 1 to 2",
    ),
    "text": (lambda: ["a"], lambda x: x.__setitem__(0, "b"), "list[0] changed from 'a' to 'b'"),
    "appended": (lambda: [1], lambda x: x.append(2), "list has 2 entries, and had 1"),
    "filled": (list, lambda x: x.append(2), "list has 1 entries, and had 0"),
    "entry": (lambda: {"a": 1}, lambda x: x.update(a=2), "dict.a changed from 1 to 2"),
    "numbered entry": (lambda: {3: 1}, lambda x: x.update({3: 2}), "dict[3] changed from 1 to 2"),
    "inside": (lambda: {"a": [1, 2]}, lambda x: x["a"].reverse(), "dict.a[0] changed from 1 to 2"),
    "set": (lambda: {1}, lambda x: x.add(2), "set has 2 entries, and had 1"),
    "mode": (NETWORK, lambda x: x.eval(), "Sequential.training changed from True to False"),
    "layer's": (NETWORK, lambda x: setattr(x[1], "p", 0.2), "Dropout.p changed from 0.1 to 0.2"),
    "layer": (NETWORK, lambda x: x.append(nn.Tanh()), "the number of modules of Sequential changed from 2 to 3"),
    "another layer": (NETWORK, lambda x: x.__setitem__(1, nn.Tanh()), "Sequential.1 changed"),
    "parameter": (lambda: nn.Linear(2, 1), lambda x: setattr(x, "bias", None), "Linear.bias changed"),
    "hook": (
        lambda: nn.Linear(2, 1),
        lambda x: x.register_forward_hook(lambda m, given, out: out),
        "the number of hooks of Linear changed from 0 to 1",
    ),
    "type of a tensor": (
        lambda: nn.Linear(2, 1, bias=False),
        lambda x: x.double(),
        "Linear.weight changed its shape, type, device or requires_grad",
    ),
}


@pytest.mark.parametrize(("make", "change", "message"), MESSAGES.values(), ids=MESSAGES)
def test_changes_are_named(make, change, message):
    x = make()
    snapshot = Guards((x,))
    assert snapshot.failure_reason((x,)) is None
    change(x)
    assert snapshot.failure_reason((x,)) == message
    assert Guards((x,)).failure_reason((x,)) is None


@pytest.mark.parametrize("kind", [list, deque])
def test_what_moves_from_one_container_to_the_next_is_seen(kind):
    first, second = kind([1.0]), kind()
    snapshot = Guards((first, second))
    assert snapshot.failure_reason((first, second)) is None
    second.append(first.pop())
    assert snapshot.failure_reason((first, second)).endswith("has 0 entries, and had 1")


def test_changes_of_variables_are_named(monkeypatch):
    get, put = holder(1.0)
    x = Plain()
    snapshot = Guards((get, x))
    put(2.0)
    assert snapshot.failure_reason((get, x)) == "holder.<locals>.get.value changed from 1.0 to 2.0"
    put(1.0)
    assert snapshot.failure_reason((get, x)) is None
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "NUMBER", 2.0)
        assert snapshot.failure_reason((get, x)) == "test_guards.NUMBER changed from 1.0 to 2.0"
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "of_class", 2.0)
        assert snapshot.failure_reason((get, x)) == "Plain.of_class changed from 1.0 to 2.0"
    assert snapshot.failure_reason((get, x)) is None


def test_other_roots_are_a_change():
    a, b = Plain(), Plain()
    snapshot = Guards((a.method, 3))
    assert snapshot.failure_reason((a.method, 3)) is None  # each access creates a new bound method
    for roots in ((b.method, 3), (a.method, 4), (a.doubled, 3), (a.method,)):
        assert snapshot.failure_reason(roots) == "the model, the guide or an argument is a different object"


def test_equal_values_are_no_change():
    x = Plain([1.0, float("nan"), "text", (1, (2,)), [], {}])
    snapshot = Guards((x,))
    x.value[:] = [float("1"), float("nan"), "te" + "xt"[:2], (1, (2,)), [], {}]
    assert snapshot.failure_reason((x,)) is None
    x.value[4] = [1]
    assert snapshot.failure_reason((x,)) == "Plain.value[4] changed"


def test_attributes_may_be_skipped():
    x = Derived()
    snapshot = Guards((x,), skip={Plain: frozenset({"value"})})
    x.value = torch.zeros(3)
    assert snapshot.failure_reason((x,)) is None
    assert not Guards((x,), skip={Plain: frozenset({"value"})}).tensors
    x.other = 1.0
    assert Guards((x,), skip={Plain: frozenset({"value"})}).failure_reason((x,)) is None


def test_libraries_are_not_entered():
    # Nor is what a function of a library reads, which would be endless.
    assert not Guards((torch.nn.functional.linear, random.random, print, nn.Linear, torch, Trace_ELBO)).tensors


def test_too_many_objects_are_refused(monkeypatch):
    monkeypatch.setattr(guards, "_MAX_SLOTS", 20)
    Guards(([[] for _ in range(18)],))
    with pytest.raises(Untraceable, match="more than 20 objects can be reached, too many to watch"):
        Guards(([[] for _ in range(20)],))


def test_a_fingerprint_does_not_depend_on_tensors():
    def fingerprint(p: float, on: bool = True) -> tuple:
        return Guards((nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)).train(on),)).fingerprint

    assert fingerprint(0.1) == fingerprint(0.1)
    assert len({fingerprint(0.1), fingerprint(0.2), fingerprint(0.1, on=False), fingerprint(0.1)}) == 3


@pytest.mark.parametrize("train", [True, False])
def test_steps_of_training_are_no_change(train):
    likelihood = likelihoods.Normal(2, 3, lambda *given: nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2)))
    vae = VAE(priors.GaussianMixture(2, 3), likelihood, encoders.DiagonalNormal(3, 2)).train(train)
    elbo, x = Trace_ELBO(), torch.randn(5, 3)
    optimizer = torch.optim.Adam(vae.parameters())
    roots = vae.model, vae.guide, elbo
    for step in range(3):
        elbo.loss_and_grads(vae.model, vae.guide, x)
        optimizer.step()
        vae.zero_grad(set_to_none=step == 1)
        if step == 0:
            snapshot = Guards(roots, tuple(pyro.get_param_store().keys()))
        assert snapshot.failure_reason((vae.model, vae.guide, elbo)) is None
    assert {id(p) for p in vae.parameters()} == {id(p) for p in snapshot.leaves}
    vae.load_state_dict(vae.state_dict())
    assert snapshot.failure_reason(roots) is None
