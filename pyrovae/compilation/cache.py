"""The cache of compiled graphs: which graph serves a call, and when a new one is worth its compilation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyrovae.arguments import holds_packed
from pyrovae.compilation import torch_internals
from pyrovae.compilation.cudagraph import PostStep
from pyrovae.compilation.graph import CompiledGraph, Function, compile_graph
from pyrovae.compilation.guards import ATOMS, Guards, Snapshot, tensor_metadata
from pyrovae.compilation.playback import play_back
from pyrovae.compilation.recording import Recording
from pyrovae.compilation.tracing import inductor
from pyrovae.inference.messages import ObservedChecked, Untraceable, warn
from pyrovae.inference.sites import SharedSitesScaled
from pyrovae.inference.structure import named_plate

# Graphs for inputs of the same shapes. With more, what they differ in changes too often.
_MAX_GRAPHS = 4
# Eager calls before inputs of other shapes than the first get a graph: a compilation takes seconds; what is played back
# saves the time of its trace and its comparisons in about so many calls. Sequences may have a new length in each batch.
_WARMUP_CALLS, _WARMUP_CALLS_PLAYED_BACK = 32, 16


class GraphCache:
    r"""Compiled graphs of functions of tensors: one for each kind of inputs and each state that a function reads.

    A function runs eagerly some times, and is then traced. Its graph takes as further inputs all tensors that the
    function can reach, such as parameters and buffers. Everything else that it can reach (numbers, flags, which objects
    there are) is guarded: it is compared before every call, and a change leads to a new graph. At calls 1, 2, 4, 8, ...
    a graph is compared with the function itself, for the same noise. Inputs of other shapes than the first run eagerly
    until they have come often enough to be worth a compilation.

    Args:
        name: of the functions, for messages.
        backend: makes a function of tensors from a recording: :func:`~pyrovae.compilation.tracing.inductor` or
            :func:`~pyrovae.compilation.playback.play_back`.
        report: called with a line of text before a compilation, and with an empty one after it.
        warmup: for graphs that are played back, how often the first kind of inputs comes before it gets one.
    """

    def __init__(
        self,
        name: str,
        backend: Callable[[Recording], Callable] = inductor,
        report: Callable[[str], Any] = lambda line: None,
        warmup: int = 3,
    ):
        self.name, self.backend, self.report, self.warmup = name, backend, report, warmup
        self.refused: Callable[[str], Any] = warn  # called with the reason why there are no graphs
        self.calls = 0
        self.reason: str | None = None  # why there are no graphs any more
        self._latest: CompiledGraph | None = None  # the graph of the latest call
        self._entries: dict[tuple, _Entry] = {}
        self._resumed_calls: dict[tuple, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of calls by shapes of inputs, so that a resumed run compiles at the same steps."""
        calls = {_shapes(metadata): entry.calls for (_, metadata), entry in self._entries.items()}
        return {"calls": [[list(map(list, shapes)), n] for shapes, n in (self._resumed_calls | calls).items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state that was saved."""
        self._resumed_calls = {tuple(map(tuple, shapes)): n for shapes, n in state["calls"]}

    def __call__(
        self,
        function: Function,
        inputs: list[Tensor],
        roots: tuple,
        static: Any,
        post_step: PostStep | None = None,
        unchanged: bool = False,
    ) -> tuple[Any, Guards] | None:
        """Returns what a function returns, without a graph of autograd, and the guards of the state that it read.

        None where there is no graph: not yet, or never, after one line to `refused` that says why. Nothing has been
        computed then.

        Args:
            function: called with the leaves of autograd that it reads; returns a pytree of tensors. It may draw torch's
                random numbers and change buffers of modules, and must not change anything else that it reads.
            inputs: tensors that it reads, different at each call.
            roots: objects from which everything else that it reads can be reached.
            static: the rest of what it depends on, part of the cache key: hashable.
            post_step: called with the result before it is returned. A later call may overwrite the result then.
            unchanged: whether no code of a user ran since the latest call, so that nothing that is guarded changed.

        Raises:
            RuntimeError: when a graph disagrees with the function.
        """
        if self.reason is not None:
            return None
        self.calls += 1
        latest, self._latest = self._latest, None
        before: Snapshot | None = None
        try:
            if torch_internals.MISSING:
                raise Untraceable(f"torch {torch.__version__} lacks what tracing needs: {torch_internals.MISSING}")
            if any(t.requires_grad for t in inputs):
                raise Untraceable("an argument requires a gradient")
            entry = self._entry(inputs, static)
            entry.calls += 1
            is_same = (
                unchanged and latest is not None and latest in entry.graphs[:1] and latest.is_watched_enough(inputs)
            )
            graph, change = (latest, None) if is_same else entry.look_up(inputs, roots)
            self._latest = graph
            if graph is not None:
                if graph.background is not None:
                    graph.compile_in_background(function, inputs, entry.calls)
                return graph(function, inputs, post_step), graph.guards
            if entry.calls <= entry.warmup:
                return None
            if len(entry.graphs) == _MAX_GRAPHS:
                raise Untraceable(
                    f"{change}, and there are {_MAX_GRAPHS} graphs for earlier values already; keep what changes in a "
                    "tensor, and change that in place by fill_ or copy_"
                )
            self.report(f"compiling {self.name}" + (f", for {change}" if change else ""))
            before = Snapshot(roots)
            graph, result = compile_graph(function, self.name, inputs, roots, post_step, entry.calls, self.backend)
            self.report("")
            entry.graphs.insert(0, graph)
            return result, graph.guards
        except Untraceable as error:
            if before is not None:  # the runs of an attempt are no steps
                before.restore()
            self.refuse(error)
            return None

    def close(self) -> None:
        """Ends what compiles in the background."""
        for entry in self._entries.values():
            for graph in entry.graphs:
                if graph.background is not None:
                    graph.background.close()

    def refuse_packed(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Makes no graphs for a function that is called with a packed sequence, whose lengths no graph can follow."""
        if self.reason is None and holds_packed(args, kwargs):
            self.refuse(Untraceable("the lengths in a packed sequence decide what is computed"))

    def refuse(self, error: Untraceable) -> None:
        """Makes no more graphs, and warns that it does not."""
        self.reason = str(error)
        self.refused(f"{self.name} is not compiled, and runs eagerly: {error}.")

    def _entry(self, inputs: list[Tensor], static: Any) -> "_Entry":
        """Returns the entry for a call, a new one if there is none."""
        metadata = tuple(map(tensor_metadata, inputs))
        context = (static, _handlers(), _process_settings(inputs))
        key = (context, metadata)
        entry = self._entries.get(key)
        if entry is None:
            others = [other for other, shapes in self._entries if shapes == metadata]
            if len(others) == _MAX_GRAPHS:
                raise Untraceable(
                    f"{_difference(context, others)} is a new value, and there are graphs for {_MAX_GRAPHS} earlier "
                    "values already; if it is an argument, make it a tensor"
                )
            calls = self._resumed_calls.get(_shapes(metadata), 0)
            if self.backend is play_back:
                warmup = max(self.warmup, _WARMUP_CALLS_PLAYED_BACK if self._entries else 0)
            else:
                warmup = _WARMUP_CALLS if self._entries else 0
            entry = self._entries[key] = _Entry(calls, warmup)
        return entry


@dataclass
class _Entry:
    """The graphs for one cache key.

    Args:
        calls: of an earlier process of the run too.
        warmup: number of calls that run eagerly, before there is a graph.
        graphs: the most recently used first.
    """

    calls: int
    warmup: int
    graphs: list[CompiledGraph] = field(default_factory=list)

    def look_up(self, inputs: list[Tensor], roots: tuple) -> tuple[CompiledGraph | None, str | None]:
        """Returns the graph whose guards hold; or None, and why those of the last one failed."""
        change = None
        for i, graph in enumerate(self.graphs):
            change = graph.failure_reason(inputs, roots)
            if change is None:
                if i:
                    self.graphs.insert(0, self.graphs.pop(i))  # tried first in the next call
                return graph, None
        return None, change


def backend_of(compile: Any) -> Callable[[Recording], Callable] | None:
    """Returns what makes functions of recordings for the argument `compile` of a user; None for False.

    Raises:
        ValueError: when it is not "auto", True or False.
    """
    if isinstance(compile, bool):
        return inductor if compile else None
    if isinstance(compile, str) and compile == "auto":
        return play_back
    raise ValueError(f'compile must be "auto", True or False, got {compile!r}.')


def _shapes(metadata: tuple) -> tuple:
    return tuple(tuple(shape) for shape, *_ in metadata)


def _handlers() -> tuple:
    """Returns the part of the cache key for the Pyro handlers around a call."""
    key: list[tuple] = []
    for handler in _PYRO_STACK:
        if isinstance(handler, (TraceMessenger, ObservedChecked)):
            continue
        if isinstance(handler, SharedSitesScaled):
            key.append((type(handler), handler.plate, handler.share))
            continue
        state = {name: value for name, value in vars(handler).items() if isinstance(value, ATOMS)}
        if any(value is not None and name not in state and value != [] for name, value in vars(handler).items()):
            raise Untraceable(
                f"it runs inside {type(handler).__name__}, whose state cannot be compared from call to call"
            )
        key.append((type(handler), *sorted(state.items())))
    return tuple(key)


def _process_settings(inputs: list[Tensor]) -> tuple:
    """Returns the part of the cache key for the settings of the process that a graph depends on."""
    kinds = {"cpu", *(t.device.type for t in inputs)}
    casts = tuple((kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind))
    return (
        casts,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        named_plate.get(),
    )


def _difference(key: tuple, others: list[tuple]) -> str:
    """Returns the cache-key entries that are new, for a message."""
    known = {leaf for other in others for leaf in _leaves(other)}
    new = [repr(leaf) for leaf in _leaves(key) if leaf not in known and isinstance(leaf, ATOMS)]
    return ", ".join(new) or "a setting"


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple):
        for item in x:
            yield from _leaves(item)
    else:
        yield x
