r"""Objectives as compiled graphs: what Pyro's handlers do is done once, and what they read is watched."""

import logging
import math
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

from pyrovae.arguments import holds_packed
from pyrovae.bounds import Bound, Terms
from pyrovae.bounds.schedules import ScheduledStep
from pyrovae.compilation.cudagraph import CudaGraph, PostStep, on_one_gpu
from pyrovae.compilation.guards import ATOMS, Guards, same, tensor_kind
from pyrovae.distributed import Shard
from pyrovae.inference.messages import ObservedChecked, Untraceable, check_observed_by, warn
from pyrovae.inference.running import full_precision
from pyrovae.inference.structure import named_plate

__all__ = ["Compiled", "GraphCache", "compile"]

# Graphs for inputs of one kind: with more, what they differ in changes too often.
_MOST = 4
# Calls after which inputs of another shape than the first get a graph of their own, which takes seconds to make.
_WORTH_IT = 32
# Calls between looks at a GPU.
_ASK_EVERY = 50
# What a bound and its schedules change at every step, and give to a graph as inputs; what a guide makes anew before use.
_SKIP = {Bound: frozenset({"steps", "_inspected", "_structure"}), AutoGuide: frozenset({"plates"})}


class GraphCache:
    r"""Functions of tensors as compiled graphs, one for each kind of inputs and each state of what is read.

    A function runs as it is first, and once more to be traced, with what it reads as further inputs: parameters, buffers
    and any other tensor that it can reach. What else it can reach (numbers, flags, which objects there are) is compared
    before every call; where something has changed, there is a graph anew. At the first, second, fourth, eighth ... call a
    graph is held against the function itself, with the same noise. Inputs of another shape than the first wait for a
    graph until they have come often enough to be worth it; until then the function runs as it is.

    Args:
        name: what messages call the functions.
        report: called with a line of text before something that takes long, and with an empty one after.
    """

    def __init__(self, name: str, report: Callable[[str], Any] = lambda line: None):
        self.name, self.report = name, report
        self.calls = 0
        self.reason: str | None = None
        self._kinds: dict[tuple, _Kind] = {}
        self._before: dict[tuple, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns how often inputs of each shape came without a graph, so that a run that goes on makes graphs as one would."""
        calls = {_shapes(kinds): kind.calls for (_, kinds), kind in self._kinds.items()}
        return {"calls": [[list(map(list, shapes)), number] for shapes, number in (self._before | calls).items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state that was kept."""
        self._before = {tuple(map(tuple, shapes)): number for shapes, number in state["calls"]}

    def __call__(
        self,
        function: Callable[[list[Tensor]], Any],
        inputs: list[Tensor],
        roots: tuple,
        static: Any,
        post_step: PostStep | None = None,
    ) -> tuple[Any, Guards] | None:
        """Returns what a function returns, outside of autograd, and the state that it read.

        None where there can be no graph, after one warning that says why; nothing has happened then.

        Args:
            function: called with the leaves of autograd that it reads; returns a pytree of tensors. It may draw torch's
                random numbers and change buffers of modules; what else it reads is not to change.
            inputs: tensors that it reads, others at each call.
            roots: objects from which all else can be reached that it reads.
            static: what tells one function from another, hashable.
            post_step: what is done with its result, before it is returned. The result may be overwritten by a later call then.

        Raises:
            RuntimeError: when a graph gives something else than the function.
        """
        if self.reason is not None:
            return None
        self.calls += 1
        try:
            if any(t.requires_grad for t in inputs):
                raise Untraceable("an argument requires a gradient")
            return self._call(function, inputs, roots, static, post_step)
        except Untraceable as error:
            self.refuse(error)
            return None

    def look_at(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuses a function that is called with a packed sequence, whose lengths no graph can follow."""
        if self.reason is None and holds_packed(args, kwargs):
            self.refuse(Untraceable("the lengths in a packed sequence decide what is computed"))

    def refuse(self, error: Untraceable) -> None:
        """Makes no graph any more, and warns of it."""
        self.reason = str(error)
        warn(f"{self.name} is not compiled, but run as it is: {error}.")

    def _call(
        self, function: Callable, inputs: list[Tensor], roots: tuple, static: Any, post_step: PostStep | None
    ) -> tuple[Any, Guards]:
        inner = (static, _handlers(), _process(inputs))
        key = (inner, tuple(map(tensor_kind, inputs)))
        if key not in self._kinds:
            if sum(shapes == key[1] for _, shapes in self._kinds) == _MOST:
                raise Untraceable(
                    f"{_difference(inner, [other for other, shapes in self._kinds if shapes == key[1]])} is another again; if it is "
                    "an argument, make it a tensor"
                )
            calls = self._before.get(_shapes(key[1]), 0)
            self._kinds[key] = _Kind(calls, wait=_WORTH_IT if self._kinds else 0, graphs=[], state=None)
        kind, change = self._kinds[key], None
        for i, graph in enumerate(kind.graphs):
            change = graph.failure_reason(inputs, roots)
            if change is None:
                if i:
                    kind.graphs.insert(0, kind.graphs.pop(i))  # tried first the next time
                return graph(function, inputs, post_step), graph.state
        kind.calls += 1
        if kind.calls <= kind.wait:
            if kind.state is None or kind.state.failure_reason(roots) is not None:
                kind.state = _found(function, roots)
            with pyro.validation_enabled(False):
                result = function(kind.state.leaves)
            if post_step is not None:
                post_step.call(result, kind.state)
            return result, kind.state
        if len(kind.graphs) == _MOST:
            raise Untraceable(
                f"{change}, and there are {_MOST} graphs for earlier values of such already; keep what changes in one tensor, "
                "changed in place by fill_ or copy_"
            )
        self.report(f"compiling {self.name}" + (f", for {change}" if change else ""))
        graph, result = _make(function, self.name, inputs, roots, post_step)
        self.report("")
        kind.graphs.insert(0, graph)
        return result, graph.state


def _shapes(kinds: tuple) -> tuple:
    """Returns the shapes of tensors of some kinds."""
    return tuple(tuple(shape) for shape, *_ in kinds)


@dataclass
class _Kind:
    """What there is for inputs of one kind.

    Args:
        calls: without a graph.
        wait: how many such calls there are to be.
        graphs: those made, the last used first.
        state: what was read in the last call without one.
    """

    calls: int
    wait: int
    graphs: list["_Graph"]
    state: Guards | None


class _Graph:
    """A compiled graph, for one state of what its function reads."""

    def __init__(self, name: str, state: Guards, given: list[Tensor | int], form: Any, same_as: list[int]):
        self.name, self.state, self.form, self.same_as = name, state, form, same_as
        self.run: Callable | None = None
        self.given = given  # tensors, and the places of inputs
        self.calls, self.doubted = 0, False
        self.shared: list[int] = []  # results that are to be copied
        self.recordable = False
        self.recording: CudaGraph | None = None
        self.told: list | None = None  # at the last call that was not played back

    def failure_reason(self, inputs: list[Tensor], roots: tuple) -> str | None:
        """Returns what is not as it was when the graph was made, for a message; None if all is."""
        if _same_as(inputs, self.state) != self.same_as:
            return "which arguments are one and the same tensor changed"
        return self.state.failure_reason(roots)

    def __call__(
        self, function: Callable, inputs: list[Tensor], post_step: PostStep | None, truth: tuple | None = None
    ) -> Any:
        """Returns what the graph computes, and does what follows; `truth` is what the function computes, if known."""
        self.calls += 1
        if truth is None and (not self.calls & (self.calls - 1) or self.doubted):
            truth = _undone(self.state, lambda: function(self.state.leaves))
        told = [] if post_step is None or post_step.told is None else post_step.told()
        if truth is None and self.recordable and self._is_recorded(inputs, post_step, told):
            result = self.recording.replay(inputs)
            if post_step is None:
                return tree_map_only(Tensor, torch.clone, result)
            if post_step.told is None:
                post_step.call(result, self.state)
            return result
        result = self.compute(inputs)
        if truth is not None:
            self.check(result, inputs, *truth)
        if post_step is not None:
            post_step.call(result, self.state)
        self.told = told
        return result

    def _is_recorded(self, inputs: list[Tensor], post_step: PostStep | None, told: list) -> bool:
        """Returns whether there is a recording for what is asked; makes one if it has run as it is before.

        The first time what a post_step keeps from call to call gets its memory, which is not to be made anew each time.
        """
        if self.recording is not None and self.recording.matches(told):
            return True
        self.recording = None
        if self.told is not None and same(self.told, told):
            self.record(inputs, post_step, told)
        return self.recording is not None

    def compute(self, inputs: list[Tensor]) -> Any:
        """Returns what the graph computes, in memory of its own."""
        given = [inputs[t] if isinstance(t, int) else t for t in self.given]
        # Casts are in the graph already.
        with torch.no_grad(), full_precision(t.device for t in given):
            results = list(self.run(*given))
        for i in self.shared:
            results[i] = results[i].clone(memory_format=torch.contiguous_format)
        return tree_unflatten(results, self.form)

    def record(self, inputs: list[Tensor], post_step: PostStep | None, told: list) -> None:
        """Records what the graph and a post_step launch; warns, once, where a GPU refuses."""

        def both(given: list[Tensor]) -> Any:
            result = self.compute(given)
            if post_step is not None and post_step.told is not None:
                post_step.call(result, self.state)
            return result

        try:
            self.recording = CudaGraph(both, inputs, [t for t in self.given if isinstance(t, Tensor)], told)
        except RuntimeError as error:
            self.recordable = False
            warn(f"{self.name} is compiled, but not recorded as a CUDA graph: {_reason(error)}.")

    def own(self, result: Any) -> None:
        """Finds what of a result lies in memory that it does not have for itself, and is to be copied."""
        taken = {t.untyped_storage().data_ptr() for t in self.given if isinstance(t, Tensor)}
        for i, t in enumerate(tree_leaves(result)):
            if isinstance(t, Tensor):
                place = t.untyped_storage().data_ptr()
                if place in taken or t.untyped_storage().nbytes() < t.numel() * t.element_size():
                    self.shared.append(i)
                taken.add(place)

    def check(self, result: Any, inputs: list[Tensor], expected: Any, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Raises unless a result, and the buffers, are what the function made of them.

        Values are to be the same to half of their digits. Gradients may jump: of a million rectified units some are within
        rounding of their kink, and fall on the other side. They are held to a quarter of the digits, in norm, and if that
        fails in two calls on end; half the norm fails at once.
        """
        paths, wanted = zip(*tree_flatten_with_path(expected)[0], strict=True)
        found = [*zip(["gradient" in keystr(path) for path in paths], tree_leaves(result), wanted, strict=True)]
        gradients = [(a, b) for is_gradient, a, b in found if is_gradient]
        values = [*buffers, *((a, b) for is_gradient, a, b in found if not is_gradient)]
        scalars, tensors = ([pair for pair in values if _is_scalar(pair[1]) == kind] for kind in (True, False))
        precision = _precision([*inputs, *self.state.leaves, *wanted])
        far, off = max(_error(scalars, math.inf), _error(tensors, math.inf)), _error(gradients, 2)
        self.doubted, before = off > precision**0.25, self.doubted
        if far > precision**0.5 or off > 0.5 or self.doubted and before:
            raise RuntimeError(
                f"the graph of {self.name} gives something else than {self.name} itself with the same noise: values differ by "
                f"{far:.1e} of the largest, gradients by {off:.1e} of their norm. Something that it depends on changed unseen "
                "(a file, the environment), up to so many steps ago as there had been before, or torch.compile erred. Hand what "
                "changes over as an argument, or leave out compile."
            )


def _make(
    function: Callable, name: str, inputs: list[Tensor], roots: tuple, post_step: PostStep | None
) -> tuple[_Graph, Any]:
    """Runs a function as it is, traces and compiles it; returns the graph and its first result, held against the former's."""
    state = _found(function, roots)
    truth = _undone(state, lambda: function(state.leaves))
    given = list({id(t): t for t in [*inputs, *state.tensors]}.values())
    module, form = _traced(function, given, state)
    change = state.failure_reason(roots)
    if change is not None:
        raise Untraceable(f"a run changes what the next one reads: {change}")
    again, _ = _undone(state, lambda: function(state.leaves))
    pairs = [*zip(tree_leaves(again), tree_leaves(truth[0]), strict=True)]
    if _error(pairs, 2) > _precision([*inputs, *state.leaves]) ** 0.25:
        raise Untraceable("two runs with the same noise differ: draw torch's random numbers, from its own generator")
    places, used = {id(t): i for i, t in enumerate(inputs)}, []
    for node, t in zip(module.graph.find_nodes(op="placeholder"), given, strict=True):
        if node.users:
            used.append(places.get(id(t), t))
        else:
            module.graph.erase_node(node)
    module.recompile()
    graph = _Graph(name, state, used, form, _same_as(inputs, state))
    while True:
        try:
            with _no_warnings():
                graph.run = _optimized(module)
                _undone(state, lambda: graph.own(graph.compute(inputs)))
            break
        except Exception as error:
            # A run that was killed while it compiled leaves half a file behind, which would be in the way for ever.
            damaged = re.search(r"(/\S+\.so): file too short", str(error))
            if damaged is None or not Path(damaged[1]).exists():
                raise Untraceable(f"torch.compile failed: {_reason(error)}") from error
            Path(damaged[1]).unlink()
    graph.recordable = on_one_gpu(module, [*inputs, *(t for t in used if isinstance(t, Tensor))])
    return graph, graph(function, inputs, post_step, truth)


def _traced(function: Callable, given: list[Tensor], state: Guards) -> tuple[torch.fx.GraphModule, Any]:
    """Returns a graph of what a function does with given tensors, wherever it finds them, and the form of its result."""
    forms, before = [], _other_random_states()

    def flat(*_: Tensor) -> list:
        # The very tensors that are given are followed.
        leaves, form = tree_flatten(function(state.leaves))
        forms.append(form)
        return leaves

    # With one mode for all that it makes for its records, and not one for each.
    records = tracing(TracingContext(FakeTensorMode(allow_non_fake_inputs=True)))
    try:
        with _no_warnings(), _no_host_looks(), records, _NoValues():
            module, _ = _undone(state, lambda: make_fx(flat)(*given))
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(_reason(error)) from error
    if any(map(_sized_by_values, module.graph.nodes)):
        raise Untraceable("the size of a tensor depends on values, as of x[x > 0]: use torch.where, or poutine.mask")
    if before != _other_random_states():
        raise Untraceable("random numbers of Python or NumPy would be the same in every run: draw torch's")
    return module, forms[-1]


class _NoValues(TorchFunctionMode):
    """Refuses to give the values of tensors away."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.numpy, Tensor.tolist, Tensor.__array__):
            raise Untraceable(f"values are fetched from a tensor ({func.__name__}), and would stay what they were")
        return func(*args, **(kwargs or {}))


def _sized_by_values(node: torch.fx.Node) -> bool:
    """Returns whether how large a result is depends on values."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    return any(x is not None and x.meta["val"].dtype in (torch.bool, torch.uint8) for x in node.args[1])


def _difference(inner: tuple, others: list[tuple]) -> str:
    """Returns what is not in others of what a function was told apart by, for a message."""
    known = {leaf for other in others for leaf in _flat(other)}
    return (
        ", ".join(repr(leaf) for leaf in _flat(inner) if leaf not in known and isinstance(leaf, ATOMS)) or "a setting"
    )


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple):
        for item in x:
            yield from _flat(item)
    else:
        yield x


def _same_as(inputs: list[Tensor], state: Guards) -> list[int]:
    """Returns, for each input, the place of the first tensor among inputs and state that it is; its own, mostly."""
    places: dict[int, int] = {id(t): -i for i, t in enumerate(state.tensors, start=1)}
    return [places.setdefault(id(t), i) for i, t in enumerate(inputs)]


def _optimized(module: torch.fx.GraphModule) -> Callable:
    # Eager noise, so that a run is the same one compiled or not; and no guards, for what they guard is looked at here.
    options = {"fallback_random": True, "guard_filter_fn": lambda guards: [False] * len(guards)}
    return torch.compile(module.forward, fullgraph=True, dynamic=False, options=options)


def _found(function: Callable, roots: tuple) -> Guards:
    """Runs a function and returns the state that it reads, with what a first call makes: parameters, what objects keep."""
    with poutine.trace(param_only=True) as trace:
        _undone(Guards(roots, skip=_SKIP), lambda: function([]))
    return Guards(roots, tuple(trace.trace.nodes), _SKIP)


def _undone(state: Guards, function: Callable[[], Any]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Runs a function and undoes what it did to random states and buffers.

    Returns:
        Its result, and the buffers that it changed, each with what it made of it.
    """
    versions = [t._version for t in state.tensors]
    kept = [b.clone() for b in state.buffers]
    devices = sorted({t.device for t in state.tensors if t.is_cuda}, key=str)
    torch.clear_autocast_cache()  # holds copies of weights that are no longer theirs
    try:
        with torch.random.fork_rng(devices), pyro.validation_enabled(False):
            result = function()
    finally:
        torch.clear_autocast_cache()
        known = {id(b) for b in state.buffers}
        changed = [t for t, version in zip(state.tensors, versions, strict=True) if t._version != version]
        after = [(t, t.clone()) for t in changed]
        with torch.no_grad():
            for b, before in zip(state.buffers, kept, strict=True):
                b.copy_(before)
    if not all(id(t) in known for t in changed):
        raise Untraceable(
            "it changes a tensor in place that is no buffer of a module: make it one with register_buffer"
        )
    return result, after


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Says nothing of what torch warns of in its own tracer and compiler; the function has run, and warned, before."""
    log = logging.getLogger("torch.utils.cpp_extension")  # which finds no GPU worth a line
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _no_host_looks() -> Iterator[None]:
    """Keeps Pyro from fetching numbers from tensors: to print a loss, to warn of NaN, to validate what is drawn.

    A distribution that was made outside of the model keeps to validation where that is off for those made inside.
    """
    instead = {
        "torch_item": lambda x: x.detach() if isinstance(x, Tensor) else x,
        "warn_if_nan": lambda value, *args, **kwargs: value,
    }
    replaced = [(Distribution, "_validate_sample", Distribution._validate_sample)]
    Distribution._validate_sample = lambda self, value: None
    for module in [m for name, m in sys.modules.items() if name.startswith("pyro.infer.")]:
        for name, substitute in instead.items():
            if name in vars(module):
                replaced.append((module, name, getattr(module, name)))
                setattr(module, name, substitute)
    try:
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _process(inputs: list[Tensor]) -> tuple:
    """Returns the settings of the process that a graph depends on."""
    kinds = {"cpu", *(t.device.type for t in inputs)}
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind))
    return (
        casts,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        named_plate.get(),
    )


def _other_random_states() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), *rest


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0


def _error(pairs: list[tuple[Any, Any]], order: float) -> float:
    """Returns the largest error of some results in a norm, relative to that norm of what they should be.

    What is small beside the others counts as a hundredth of the largest: it may be a difference of large numbers.
    """
    errors, sizes = [0.0], [0.0]
    for got, wanted in pairs:
        size, error = 0.0, 0.0 if got is wanted else math.inf
        if (
            isinstance(got, Tensor)
            and isinstance(wanted, Tensor)
            and got.shape == wanted.shape
            and got.dtype == wanted.dtype
        ):
            a, b = (torch.cat([t.detach().double().flatten(), t.new_zeros(1).double()]) for t in (got, wanted))
            alike = (a == b) | (a.isnan() & b.isnan())  # infinite ones too
            error = torch.linalg.vector_norm(torch.where(alike, 0.0, a - b), order).nan_to_num(math.inf).item()
            size = torch.linalg.vector_norm(b[b.isfinite()], order).item()
        errors.append(error)
        sizes.append(size)
    return max(e / max(size + max(sizes) / 100, 1e-300) for e, size in zip(errors, sizes, strict=True))


def _precision(tensors: list[Any]) -> float:
    """Returns the relative distance of numbers of the least precise kind that takes part in computing some."""
    kinds = {t.device.type for t in tensors if isinstance(t, Tensor)}
    types = [t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    types += [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)


def _reason(error: Exception) -> str:
    """Returns the first line of what went wrong, for a warning."""
    text = str(error)
    if "_local_scalar_dense" in text or "Could not guard on data-dependent" in text or "aten.nonzero" in text:
        place = _place(error)
        return f"a value is fetched from a tensor, which decides what is computed{place}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}{_place(error)}"


def _place(error: Exception) -> str:
    """Returns the last line of code that is neither torch's nor Pyro's that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    here = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    return f" ({Path(here[-1].filename).name}, line {here[-1].lineno}: {here[-1].line})" if here else ""


class Step(NamedTuple):
    """What a step of training computes.

    Args:
        loss: summed over the data, as the ELBO gives it.
        terms: what it is made of; None for one of Pyro's ELBOs.
        numbers: the loss and what it is made of, in the order of the terms' names, in one tensor of float64.
        inside: whether all observed data are in the support of their distributions.
        fine: whether they are, and the loss is finite.
        gradients: of the loss times a scale, for each leaf that it reads; None where there is none.
    """

    loss: Tensor
    terms: Terms | None
    numbers: Tensor
    inside: Tensor
    fine: Tensor
    gradients: list[Tensor | None]


class Compiled(ELBO):
    r"""An ELBO whose loss and gradient are computed together by a compiled graph; see :func:`compile`.

    Args:
        elbo: the ELBO.
        report: called with a line of text before a graph is compiled.
    """

    def __init__(self, elbo: ELBO, report: Callable[[str], Any] = lambda line: None):
        super().__init__(num_particles=elbo.num_particles, vectorize_particles=elbo.vectorize_particles)
        self.elbo = elbo
        self.graphs = GraphCache(type(elbo).__name__, report)
        self.unvalidated: frozenset[str] = frozenset()  # observed sites whose data are not checked

    def step(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        scale: float = 1.0,
        share: Shard | None = None,
        post_step: PostStep | None = None,
    ) -> tuple[Step, Guards] | None:
        """Computes a loss, and the gradient of the loss times a scale.

        Args:
            model: a Pyro model.
            guide: a Pyro guide.
            args: what both are called with.
            kwargs: what both are called with.
            scale: of the gradient.
            share: of the data of a batch whose noise is to be taken; None for noise of their own.
            post_step: what is done with a :class:`Step`, before it is returned; a later step may overwrite it then.

        Returns:
            What was computed and the state that it was computed from; None where there can be no graph, after one
            warning that says why. Nothing has happened then.
        """
        self.graphs.look_at(args, kwargs)
        leaves, form = _flattened(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        others = [x for x in leaves if not isinstance(x, Tensor)]
        schedules = self.elbo.schedules if isinstance(self.elbo, Bound) else []
        numbers = []
        if schedules:
            like = next((t for t in tensors if t.dtype in (torch.float, torch.double)), torch.empty(()))
            # Filled on a GPU, which a copy from here would wait for.
            numbers = [torch.full((), s(self.elbo.steps), dtype=like.dtype, device=like.device) for s in schedules]
        given = dict(zip(map(id, schedules), numbers, strict=True))

        def function(leaves: list[Tensor]) -> Step:
            with share.noise() if share is not None else nullcontext():
                return _step(self.elbo, model, guide, args, kwargs, given, scale, leaves, self.unvalidated)

        roots = (model, guide, self.elbo, *(x for x in others if not isinstance(x, ATOMS)))
        static = (
            scale,
            share,
            form,
            *((type(x), x) if isinstance(x, ATOMS) else type(x) for x in others),
        )
        found = self.graphs(function, [*tensors, *numbers], roots, static, post_step)
        if found is not None and isinstance(self.elbo, Bound):
            self.elbo.steps += 1
        return found

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Terms:
        """Estimates the loss of a bound and what it is made of, as :meth:`pyrovae.bounds.Bound.terms` does."""
        found = self._checked_step(model, guide, args, kwargs) if torch.is_grad_enabled() else None
        if found is None:
            return self.elbo.terms(model, guide, *args, **kwargs)
        step, state = found
        return step.terms._replace(loss=_attached(step, state))

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of the loss, not compiled."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Returns an estimate of the loss that can be differentiated, once, by the parameters."""
        found = self._checked_step(model, guide, args, kwargs) if torch.is_grad_enabled() else None
        return self.elbo.differentiable_loss(model, guide, *args, **kwargs) if found is None else _attached(*found)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor | float:
        """Returns an estimate of the loss and adds its gradient to the parameters'."""
        found = self._checked_step(model, guide, args, kwargs)
        if found is None:
            return self.elbo.loss_and_grads(model, guide, *args, **kwargs)
        step, state = found
        for p, gradient in zip(state.leaves, step.gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        return step.loss

    def _checked_step(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Step, Guards] | None:
        found = self.step(model, guide, args, kwargs)
        if found is None:
            return None
        step, state = found
        # To ask a GPU is to wait for it; it is asked now and then.
        if (not step.inside.is_cuda or self.graphs.calls % _ASK_EVERY == 0) and not bool(step.inside):
            check_observed_by(model, guide, *args, **kwargs)
        if _PYRO_STACK:  # SVI finds the parameters by these
            for name in state.params:
                pyro.param(name)
        return step, state

    def _get_trace(self, model, guide, args, kwargs):
        raise NotImplementedError("Compiled makes no traces of its own.")

    def __repr__(self) -> str:
        return f"compile({self.elbo!r})"


def compile(elbo: ELBO) -> Compiled:
    r"""Returns an ELBO that gives the same losses and gradients as another, from compiled graphs: as fast as by hand.

    The loss over a Pyro model and guide and its gradient are traced into one graph of tensor operations, through Pyro's
    handlers, and given to ``torch.compile``. It goes wherever the other does: into ``pyro.infer.SVI``, into loops of
    your own by ``loss_and_grads``, into :func:`pyrovae.fit`, which takes ``compile=True`` for short. Noise is the same
    as without, for the same seed.

    Nothing is frozen that may change: there is a graph for each shape of the data and for each state of what model and
    guide can reach (numbers, flags, train and eval mode, global variables); schedules of a bound are inputs. Each graph is
    held against the ELBO itself at its first call, its second, fourth, eighth and so on, which finds what was read from
    elsewhere, a file for one. Where there can be no graph (no C++ compiler, control flow that depends on values in
    tensors, state that every run changes) one warning says why, and the ELBO itself runs.

    To find out, model and guide are run some times more than there are steps, and what they draw then is drawn again. A guide
    that sets itself up at its first call, such as Pyro's automatic ones, does so then, without using up noise; call it once before
    if the run is to be the same as one that is not compiled.

    Args:
        elbo: one of :mod:`pyrovae.bounds`, or Pyro's ``Trace_ELBO`` or ``TraceMeanField_ELBO``; others of Pyro's look at
            values of tensors, and run as they are.

    Raises:
        TypeError: when `elbo` is none.
        RuntimeError: at a call, when a graph gives something else than the ELBO itself.

    References:
        PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation, J. Ansel
        et al., 2024, https://doi.org/10.1145/3620665.3640366.

    >>> from pyrovae import bounds
    >>> compile(bounds.IWAE(num_particles=16))
    compile(IWAE(num_particles=16, gradient=Reparameterized()))
    """
    if not isinstance(elbo, ELBO):
        raise TypeError(f"elbo must be an ELBO that is built, such as bounds.IWAE(16), got {elbo!r}.")
    return elbo if isinstance(elbo, Compiled) else Compiled(elbo)


def _flattened(args: tuple, kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
    """Returns the leaves of arguments, and their form, hashable."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return args, len(args)  # far faster than to look at it as a tree, and nearly all there is
    return tree_flatten((args, kwargs))


def _step(
    elbo: ELBO,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    numbers: dict[int, Tensor],
    scale: float,
    leaves: list[Tensor],
    unvalidated: frozenset[str],
) -> Step:
    terms = None
    kind = type(elbo).__name__
    if not hasattr(elbo, "differentiable_loss"):
        raise Untraceable(f"{kind} has no differentiable_loss")
    if _owner(elbo, "differentiable_loss") is not _owner(elbo, "loss_and_grads"):
        raise Untraceable(f"{kind} has a loss_and_grads of its own, and its differentiable_loss from another class")
    with torch.enable_grad(), ObservedChecked(later=True, without=unvalidated) as data:
        if isinstance(elbo, Bound):
            steps = elbo.steps
            elbo.steps = ScheduledStep(numbers)
            try:
                terms = elbo.terms(model, guide, *args, **kwargs)
            finally:
                elbo.steps = steps
            loss = terms.loss
            terms = terms._replace(loss=loss.detach())
        else:
            loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        gradients = [None] * len(leaves)
        if leaves and loss.requires_grad:
            gradients = list(torch.autograd.grad(loss * scale, leaves, allow_unused=True))
    loss, inside = loss.detach(), torch.as_tensor(data.inside(), device=loss.device)
    numbers = torch.stack([loss] if terms is None else [*terms.named.values()]).double()
    return Step(loss, terms, numbers, inside, loss.isfinite() & inside, gradients)


def _owner(elbo: ELBO, name: str) -> type:
    """Returns the class that a method comes from."""
    return next(cls for cls in type(elbo).__mro__ if name in vars(cls))


class _Attach(torch.autograd.Function):
    """A loss with the gradient that was computed along with it."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer: Tensor) -> tuple:
        return None, None, *(outer * gradient for gradient in ctx.gradients)


def _attached(step: Step, state: Guards) -> Tensor:
    pairs = [(g, p) for g, p in zip(step.gradients, state.leaves, strict=True) if g is not None]
    return _Attach.apply(step.loss, [g for g, _ in pairs], *(p for _, p in pairs))


def _handlers() -> tuple:
    """Returns what tells the Pyro handlers that are at work outside from others."""
    told = []
    for handler in _PYRO_STACK:
        if isinstance(handler, (TraceMessenger, ObservedChecked)):
            continue
        state = {name: value for name, value in vars(handler).items() if isinstance(value, ATOMS)}
        if any(value is not None and name not in state and value != [] for name, value in vars(handler).items()):
            raise Untraceable(f"it runs inside {type(handler).__name__}, whose state cannot be told from a later one")
        told.append((type(handler), *sorted(state.items())))
    return tuple(told)
