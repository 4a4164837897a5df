"""A compiled graph of a function: how it is made, run, recorded on a GPU and compared with the function."""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
    tree_structure,
    tree_unflatten,
)

from pyrovae.arguments import cuda_devices
from pyrovae.compilation.background import Background
from pyrovae.compilation.cudagraph import CudaGraph, PostStep, on_one_gpu
from pyrovae.compilation.guards import Guards, all_unchanged
from pyrovae.compilation.playback import play_back
from pyrovae.compilation.recording import Recording
from pyrovae.compilation.tracing import (
    describe_error,
    discover_state,
    run_and_restore,
    trace,
    without_warnings,
)
from pyrovae.inference.messages import Untraceable, warn
from pyrovae.inference.running import full_precision

Function = Callable[[list[Tensor]], Any]  # of the leaves of autograd that it reads
# Calls after which guards are checked even where no code of a user ran in between: that of another thread may have.
_UNWATCHED_CALLS = 16


class CompiledGraph:
    """A compiled graph, for one state of what its function reads.

    Args:
        name: of the function, for messages.
        guards: snapshot of the state that it reads.
        recording: of the operations that it computes.
        run_compiled: the code that computes them.
        arguments: of the code: tensors of the state, and the positions of inputs.
        structure: the tree structure of the function's result.
        played_back: whether nobody asked for the graph: where it turns out not to serve, the function runs eagerly.
        aliases: which inputs are the same tensor, as :func:`_aliases` returns them.
    """

    def __init__(
        self,
        name: str,
        guards: Guards,
        recording: Recording,
        run_compiled: Callable,
        arguments: list[Tensor | int],
        structure: Any,
        played_back: bool,
        aliases: list[int],
    ):
        self.name, self.guards, self.run_compiled = name, guards, run_compiled
        self.constants, self.changes_inputs = recording.constants(), recording.changes_inputs
        self.devices = {t.device for t in recording.inputs}
        self.arguments, self.played_back, self.aliases = arguments, played_back, aliases
        self.unflatten, self.num_results = unflattener(structure), structure.num_leaves
        self.calls = 1  # the first is made by compile_graph
        self.gradient_suspect = False  # whether gradients differed in the latest comparison
        self.copied_outputs: list[int] = []
        self.recordable = False
        self.cuda_graph: CudaGraph | None = None
        self.last_fingerprint: list | None = None  # of the post-step at the latest call that was not a replay
        self.background = Background.of(recording) if played_back else None

    def failure_reason(self, inputs: list[Tensor], roots: tuple) -> str | None:
        """Returns what changed since the graph was made, for a message; None if nothing did."""
        if _aliases(inputs, self.guards) != self.aliases:
            return "the arguments that are the same tensor changed"
        return self.guards.failure_reason(roots)

    def is_watched_enough(self, inputs: list[Tensor]) -> bool:
        """Returns whether guards need not be checked again, if nothing but graphs ran since the latest call."""
        compared_before = not self.calls & (self.calls - 1)  # and so ran the function
        return (
            not compared_before and self.calls % _UNWATCHED_CALLS > 0 and _aliases(inputs, self.guards) == self.aliases
        )

    def __call__(self, function: Function, inputs: list[Tensor], post_step: PostStep | None) -> Any:
        """Returns what the graph computes, after the post-step; compares with the function at calls 1, 2, 4, 8, ..."""
        self.calls += 1
        is_power_of_two = not self.calls & (self.calls - 1)
        if is_power_of_two or self.gradient_suspect:
            return self.run(inputs, post_step, run_and_restore(self.guards, lambda: function(self.guards.leaves)))
        cuda_graph = self._matching_cuda_graph(inputs, post_step) if self.recordable else None
        if cuda_graph is None:
            return self.run(inputs, post_step)
        result = cuda_graph.replay(inputs)
        if post_step is None:
            return tree_map_only(Tensor, torch.clone, result)
        if post_step.fingerprint is None:  # else it is a part of the CUDA graph
            post_step.call(result, self.guards)
        return result

    def run(self, inputs: list[Tensor], post_step: PostStep | None, eager: tuple | None = None) -> Any:
        """Runs the compiled code and the post-step; compares with the eager result and buffers, if given."""
        fingerprint = _fingerprint(post_step) if self.recordable else None
        # A result that is compared may be refused.
        result = self.compute(inputs, None if post_step is None or eager is not None else post_step.on_gradient)
        if eager is not None:
            self.compare(result, inputs, *eager)
        if post_step is not None:
            post_step.call(result, self.guards)
        self.last_fingerprint = fingerprint
        return result

    def compute(self, inputs: list[Tensor], on_gradient: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Returns what the compiled code computes, in memory of its own; gradients are shown as soon as they are there.

        Gradients by all leaves are the last results of such a function.
        """
        given = [inputs[t] if isinstance(t, int) else t for t in self.arguments]
        # The casts of autocast are in the graph already.
        casts = any(torch.is_autocast_enabled(device.type) for device in self.devices)
        with torch.no_grad(), full_precision(self.devices) if casts else nullcontext():
            if on_gradient is None or not self.played_back:
                results = list(self.run_compiled(*given))
            else:
                first = self.num_results - len(self.guards.leaves)

                def ready(k: int, x: Tensor) -> None:
                    if k >= first:
                        on_gradient(self.guards.leaves[k - first], x)

                results = list(self.run_compiled(*given, ready=ready))
        for i in self.copied_outputs:
            results[i] = results[i].clone(memory_format=torch.contiguous_format)
        return self.unflatten(results)

    def _matching_cuda_graph(self, inputs: list[Tensor], post_step: PostStep | None) -> CudaGraph | None:
        """Returns a CUDA graph that matches, if any; records at the second call with the same fingerprint.

        The call before allocates what a post-step keeps from call to call, which must not happen at every replay.
        """
        fingerprint = _fingerprint(post_step)
        if self.cuda_graph is None or not self.cuda_graph.matches(fingerprint):
            self.cuda_graph = None
            if self.last_fingerprint is not None and all_unchanged(self.last_fingerprint, fingerprint):
                self.record(inputs, post_step, fingerprint)
        return self.cuda_graph

    def record(self, inputs: list[Tensor], post_step: PostStep | None, fingerprint: list) -> None:
        """Records what the compiled code and the post-step launch; warns, once, where a GPU refuses."""

        def run(inputs: list[Tensor]) -> Any:
            result = self.compute(inputs)
            if post_step is not None and post_step.fingerprint is not None:
                post_step.call(result, self.guards)
            return result

        kept = [t for t in self.arguments if isinstance(t, Tensor)]
        try:
            self.cuda_graph = CudaGraph(run, inputs, kept, fingerprint)
        except RuntimeError as error:
            self.recordable = False
            warn(f"{self.name} is compiled, but not recorded as a CUDA graph: {describe_error(error)}.")

    def compile_in_background(self, function: Function, inputs: list[Tensor], num_calls: int) -> None:
        """Starts a compilation in the background, or puts its result in the place of what is played back.

        Args:
            function: the function.
            inputs: of this call.
            num_calls: with inputs of these shapes up to now, this one included, of earlier processes of the run too.
        """
        background = self.background
        if background is None or num_calls < background.start_at:
            return
        if num_calls < background.take_over_at:
            if background.process is None and not background.has_failed:
                background.start()
            return
        self.background, compiled = None, background.result()
        if compiled is None:
            return
        kept = self.run_compiled, self.copied_outputs
        self.run_compiled, self.copied_outputs, self.played_back = compiled, [], False
        try:
            result, _ = run_and_restore(self.guards, lambda: self.compute(inputs))
            self.find_aliased_outputs(result)
            self.compare(result, inputs, *run_and_restore(self.guards, lambda: function(self.guards.leaves)))
        except (RuntimeError, Untraceable):
            self.gradient_suspect = True
        if self.gradient_suspect:  # a library that is not right, or not surely
            (self.run_compiled, self.copied_outputs), self.played_back = kept, True
            self.gradient_suspect = False

    def find_aliased_outputs(self, result: Any) -> None:
        """Finds outputs that alias other tensors, or expand over their memory; :meth:`compute` copies them."""
        kept = [t for t in (*self.arguments, *self.constants) if isinstance(t, Tensor)]
        taken = {t.untyped_storage().data_ptr() for t in kept}
        for i, t in enumerate(tree_leaves(result)):
            if isinstance(t, Tensor):
                address = t.untyped_storage().data_ptr()
                if address in taken or t.untyped_storage().nbytes() < t.numel() * t.element_size():
                    self.copied_outputs.append(i)
                taken.add(address)

    def compare(self, result: Any, inputs: list[Tensor], expected: Any, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Raises an error unless a result, and the buffers, agree with the eager ones.

        Values must agree to half of their digits. Gradients may jump: of a million rectified units, some are within
        rounding of their kink and fall on the other side. Gradients must agree, in norm, to a quarter of their digits
        in one of two successive calls, and to half of their norm in each. The first two results of a graph that is
        played back must agree to the bit, but on a GPU, where sums may depend on the order in which threads end.
        """
        paths, wanted = zip(*tree_flatten_with_path(expected)[0], strict=True)
        pairs = [*zip(["gradient" in keystr(path) for path in paths], tree_leaves(result), wanted, strict=True)]
        gradients = [(a, b) for is_gradient, a, b in pairs if is_gradient]
        values = [*buffers, *((a, b) for is_gradient, a, b in pairs if not is_gradient)]
        scalars, tensors = ([pair for pair in values if _is_scalar(pair[1]) == kind] for kind in (True, False))
        value_error = max(_relative_error(scalars, math.inf), _relative_error(tensors, math.inf))
        gradient_error = _relative_error(gradients, 2)
        precision = _precision([*inputs, *self.guards.leaves, *wanted])
        was_suspect, self.gradient_suspect = self.gradient_suspect, gradient_error > precision**0.25
        wrong = value_error > precision**0.5 or gradient_error > 0.5 or (self.gradient_suspect and was_suspect)
        if self.played_back and self.calls <= 2 and not self.changes_inputs:
            on_cpu = all(device.type == "cpu" for device in self.devices)
            if wrong or on_cpu and not all(_same_bits(a, b) for a, b in (*gradients, *values)):
                raise Untraceable("it reads something that changes from call to call, and that no guard sees")
        elif wrong:
            raise RuntimeError(
                f"the compiled graph of {self.name} disagrees with {self.name} itself for the same noise: values "
                f"differ by {value_error:.1e} of the largest, gradients by {gradient_error:.1e} of their norm. Either "
                "it reads something that no guard sees (a file, the environment), which changed since the last "
                "comparison (made at calls 1, 2, 4, 8, ...); or torch.compile made an error. Pass what changes as an "
                "argument, or pass compile=False."
            )


def compile_graph(
    function: Function,
    name: str,
    inputs: list[Tensor],
    roots: tuple,
    post_step: PostStep | None,
    num_calls: int,
    backend: Callable[[Recording], Callable],
) -> tuple[CompiledGraph, Any]:
    """Runs a function eagerly, traces and compiles it.

    Args:
        function: the function.
        name: of it, for messages.
        inputs: tensors that it reads, different at each call.
        roots: objects from which everything else that it reads can be reached.
        post_step: called with the result.
        num_calls: with inputs of these shapes up to now, this one included.
        backend: makes a function of tensors from a recording.

    Returns:
        The graph, and its first result, checked against the eager result.

    Raises:
        Untraceable: when there can be no graph.
    """
    guards = discover_state(function, roots)
    ends: list[list[Tensor]] = []  # the random states after a run

    def noted(result: Any) -> Any:
        ends.append([torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda_devices(guards.tensors))])
        return result

    eager = run_and_restore(guards, lambda: noted(function(guards.leaves)))
    tensors = list({id(t): t for t in [*inputs, *guards.tensors]}.values())
    recording, again = trace(function, tensors, guards)
    change = guards.failure_reason(roots)
    if change is not None:
        raise Untraceable(f"a run changes what the next one reads: {change}")
    pairs = [*zip(tree_leaves(again), tree_leaves(eager[0]), strict=True)]
    if _relative_error(pairs, 2) > _precision([*inputs, *guards.leaves]) ** 0.25:
        raise Untraceable("two runs with the same noise differ: draw random numbers from torch's global generator")
    positions = {id(t): i for i, t in enumerate(inputs)}
    arguments = [positions.get(id(t), t) for t in recording.inputs]
    structure = tree_structure(again)
    while True:
        try:
            with without_warnings():
                compiled = backend(recording)
                graph = CompiledGraph(
                    name,
                    guards,
                    recording,
                    compiled,
                    arguments,
                    structure,
                    played_back=backend is play_back,
                    aliases=_aliases(inputs, guards),
                )
                graph.find_aliased_outputs(run_and_restore(guards, lambda: noted(graph.compute(inputs)))[0])
            break
        except Exception as error:
            # A run that was killed while it compiled leaves half a file in the cache, where every later run finds it.
            damaged = re.search(r"(/\S+\.so): file too short", str(error))
            if damaged is None or not Path(damaged[1]).exists():
                raise Untraceable(f"no code could be made of its graph: {describe_error(error)}") from error
            Path(damaged[1]).unlink()
    if not all(map(torch.equal, ends[0], ends[-1])):  # else the noise of the next call would be other noise
        raise Untraceable("it sets the state of torch's random numbers, or draws some that its result does not need")
    graph.recordable = on_one_gpu(recording, inputs)
    graph.compile_in_background(function, inputs, num_calls)
    return graph, graph.run(inputs, post_step, eager)


def unflattener(structure: TreeSpec) -> Callable[[list], Any]:
    """Returns a function that does to leaves what torch's ``tree_unflatten`` does, in a tenth of its time.

    >>> unflattener(tree_structure({"a": 1, "b": (2, [3, None])}))([1, 2, 3, None])
    {'a': 1, 'b': (2, [3, None])}
    """
    names: dict[str, Any] = {}

    def text(x: Any) -> str:
        if isinstance(x, int):
            return f"x[{x}]"
        if isinstance(x, dict):
            return "{" + ", ".join(f"{key!r}: {text(value)}" for key, value in x.items()) + "}"
        items = "".join(f"{text(item)}, " for item in x)
        if type(x) is list:
            return f"[{items}]"
        names[type(x).__name__] = type(x)
        return f"({items})" if type(x) is tuple else f"{type(x).__name__}({items})"

    places = tree_unflatten(range(structure.num_leaves), structure)
    return eval(f"lambda x: {text(places)}", names)


def _aliases(inputs: list[Tensor], guards: Guards) -> list[int]:
    """Returns, for each input, the position of the first tensor among inputs and state that is the same object."""
    first: dict[int, int] = {}
    return [guards.positions.get(id(t)) or first.setdefault(id(t), i) for i, t in enumerate(inputs)]


def _fingerprint(post_step: PostStep | None) -> list:
    return [] if post_step is None or post_step.fingerprint is None else post_step.fingerprint()


def _same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0


def _relative_error(pairs: list[tuple[Any, Any]], order: float) -> float:
    """Returns the largest error among pairs of a result and its expected value: a norm relative to the expected norm.

    One hundredth of the largest expected norm is added to each: a value that is much smaller than the others may be a
    difference of large numbers.
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
            agree = (a == b) | (a.isnan() & b.isnan())  # infinities too
            error = torch.linalg.vector_norm(torch.where(agree, 0.0, a - b), order).nan_to_num(math.inf).item()
            size = torch.linalg.vector_norm(b[b.isfinite()], order).item()
        errors.append(error)
        sizes.append(size)
    return max(e / max(size + max(sizes) / 100, 1e-300) for e, size in zip(errors, sizes, strict=True))


def _precision(tensors: list[Any]) -> float:
    """Returns the machine epsilon of the least precise floating-point type among some tensors, autocast included."""
    device_types = {t.device.type for t in tensors if isinstance(t, Tensor)}
    dtypes = [t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    dtypes += [torch.get_autocast_dtype(kind) for kind in device_types if torch.is_autocast_enabled(kind)]
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
