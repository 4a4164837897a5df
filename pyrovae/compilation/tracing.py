"""Tracing of a function into a graph of tensor operations, and runs of a function that leave no effects behind."""

import gc
import io
import logging
import operator
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import util as infer_util
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrovae.arguments import cuda_devices
from pyrovae.bounds import Bound
from pyrovae.compilation import torch_internals
from pyrovae.compilation.guards import Guards, all_unchanged
from pyrovae.compilation.recording import FetchesValueError, Recording, record
from pyrovae.inference.messages import Untraceable

# Attributes that are not guarded: what a bound and its schedules change at every step, which a graph takes as inputs,
# and what a guide creates again before each use.
_UNGUARDED = {Bound: frozenset({"steps", "_inspected"}), AutoGuide: frozenset({"plates"})}


def discover_state(function: Callable[[list[Tensor]], Any], roots: tuple) -> Guards:
    """Runs a function once, and returns guards for the state that it reads.

    The run comes first, because a first call may create state: parameters in Pyro's store, attributes of objects.
    """
    with poutine.trace(param_only=True) as trace:
        run_and_restore(Guards(roots, skip=_UNGUARDED), lambda: function([]))
    return Guards(roots, tuple(trace.trace.nodes), _UNGUARDED)


def run_and_restore(guards: Guards, function: Callable[[], Any]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Runs a function and restores torch's random states and the buffers of modules.

    Returns:
        Its result, and each buffer that it changed with the value that it gave to it.

    Raises:
        Untraceable: when it changes another tensor in place.
    """
    versions = [t._version for t in guards.tensors]
    kept = [b.clone() for b in guards.buffers]
    # The cache of autocast holds copies of weights, which may have changed since.
    torch.clear_autocast_cache()
    try:
        with torch.random.fork_rng(cuda_devices(guards.tensors)), pyro.validation_enabled(False):
            result = function()
    finally:
        torch.clear_autocast_cache()
        changed = [t for t, version in zip(guards.tensors, versions, strict=True) if t._version != version]
        after = [(t, t.clone()) for t in changed]
        with torch.no_grad():
            for b, before in zip(guards.buffers, kept, strict=True):
                b.copy_(before)
    buffers = {id(b) for b in guards.buffers}
    if not all(id(t) in buffers for t in changed):
        raise Untraceable(
            "it changes a tensor in place that is not a buffer of a module: register it with register_buffer"
        )
    return result, after


def trace(function: Callable[[list[Tensor]], Any], inputs: list[Tensor], guards: Guards) -> tuple[Recording, Any]:
    """Traces what a function does with some tensors, through whatever object it reaches them.

    Returns:
        The graph, and the result of the function.
    """
    structures: list[Any] = []
    known = set(map(id, inputs))

    def flat() -> list:
        leaves, structure = tree_flatten(function(guards.leaves))
        structures.append(structure)
        return leaves

    def run() -> tuple[Recording, list]:
        return run_and_restore(guards, lambda: record(flat, inputs))[0]

    def found_by(recording: Recording) -> list[Tensor]:  # tensors that the search for the state did not find
        return [t for t in recording.inputs if id(t) not in known]

    before = _other_random_states()
    printed = io.StringIO()
    collects = gc.isenabled()
    gc.disable()  # it would look through hundreds of thousands of new nodes many times
    try:
        with without_warnings(), _without_host_reads(), _RefuseValues(), redirect_stdout(printed):
            recording, leaves = run()
            found = found_by(recording)
            again = found_by(run()[0]) if found else []
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(describe_error(error)) from error
    finally:
        if collects:
            gc.enable()
    if not all_unchanged(found, again):
        raise Untraceable("it reads a tensor that each run makes anew in a way that no graph can follow")
    if printed.getvalue():
        raise Untraceable("it prints, which a graph would not")
    if before != _other_random_states():
        raise Untraceable("random numbers of Python or NumPy would be the same in every run: use torch's")
    return recording, tree_unflatten(leaves, structures[-1])


def inductor(recording: Recording) -> Callable:
    """Compiles a graph by ``torch.compile`` and its Inductor."""
    return compile_module(recording.module())


def compile_module(module: torch.fx.GraphModule) -> Callable:
    """Compiles a graph; it draws random numbers as it would eagerly."""
    # Random numbers as in eager mode, so that a compiled run gives the same results. No guards of torch's: ours decide.
    options: dict[str, Any] = {"fallback_random": True, "guard_filter_fn": lambda guards: [False] * len(guards)}
    if torch_internals.has_vector_instructions():
        options["cpp.vec_isa_ok"] = True
    return torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silences torch's tracer and compiler. The function itself ran eagerly before, and gave its warnings then."""
    log = logging.getLogger("torch.utils.cpp_extension")  # logs that there is no GPU
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def describe_error(error: Exception) -> str:
    """Returns the first line of an error, and the line of code that caused it, for a warning."""
    # The last line of code that is neither an installed package's nor of this package.
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    frames = [f for f in frames if Path(f.filename).parent != Path(__file__).parent and f.filename[:1] != "<"]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    text = str(error)
    if isinstance(error, FetchesValueError):
        return f"the computation depends on a value fetched from a tensor{place}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}{place}"


class _RefuseValues(TorchFunctionMode):
    """Refuses conversions of tensors to NumPy arrays and lists, which no operation shows.

    Where Pyro sums over the values of a latent, it asks whether all probabilities are positive, and leaves out the
    terms of the others. Here the answer is yes, and :func:`_positive_part_of_dot` leaves them out.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise Untraceable(f"values are fetched from a tensor ({func.__name__}), and would be constants in a graph")
        if func is Tensor.__bool__ and sys._getframe(1).f_code is infer_util.Dice.compute_expectation.__code__:
            return True
        return func(*args, **(kwargs or {}))


class _Number:
    """A number that Pyro reads from a tensor: of double precision, as Python's are, until it meets a tensor.

    Args:
        value: a tensor without dimensions.
    """

    def __init__(self, value: Tensor):
        self.value = value

    def __neg__(self) -> "_Number":
        return _Number(-self.value)

    def _with(self, operation: Callable, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return _Number(operation(self.value, other.value if isinstance(other, _Number) else other))
        dtype = other.dtype if other.is_floating_point() else torch.get_default_dtype()
        return operation(self.value.to(dtype), other)

    def __add__(self, other: Any) -> Any:
        return self._with(operator.add, other)

    def __radd__(self, other: Any) -> Any:
        return self._with(lambda a, b: b + a, other)

    def __sub__(self, other: Any) -> Any:
        return self._with(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._with(lambda a, b: b - a, other)

    def __mul__(self, other: Any) -> Any:
        return self._with(operator.mul, other)

    def __rmul__(self, other: Any) -> Any:
        return self._with(lambda a, b: b * a, other)

    def __truediv__(self, other: Any) -> Any:
        return self._with(operator.truediv, other)


def _positive_part_of_dot(probabilities: Tensor, terms: Tensor) -> Tensor:
    """Returns the sum of terms, weighted by probabilities, without those of probability 0, which may be infinite."""
    # A copy in the order of their memory, on which the order of the sum depends.
    kept = terms.clone().masked_fill_(probabilities <= 0, 0.0)
    return torch.tensordot(probabilities, kept, dims=probabilities.dim())


def _other_random_states() -> tuple:
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    return random.getstate(), kind, keys.tobytes(), *rest


@contextmanager
def _without_host_reads() -> Iterator[None]:
    """Keeps Pyro from reading numbers from tensors: to print a loss, to warn of NaN, to validate draws, to sum.

    Validation is replaced in the class, because a distribution that was built outside of the model validates whatever
    ``pyro.validation_enabled`` says.
    """
    in_modules: dict[str, Callable] = {
        "torch_item": lambda x: _Number(x.detach().double()) if isinstance(x, Tensor) else x,
        "warn_if_nan": lambda value, *args, **kwargs: value,
        "_fulldot": _positive_part_of_dot,
    }
    substitutes: list[tuple[Any, str, Callable]] = [(Distribution, "_validate_sample", lambda self, value: None)]
    for module in [m for name, m in sys.modules.items() if name.startswith("pyro.infer.")]:
        substitutes += [(module, name, in_modules[name]) for name in in_modules if name in vars(module)]
    originals = [getattr(owner, name) for owner, name, _ in substitutes]
    for owner, name, substitute in substitutes:
        setattr(owner, name, substitute)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(substitutes, originals, strict=True):
            setattr(owner, name, original)
