"""Playing a recording back: its operations one after the other, without Python handlers, autograd or a compiler."""

import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae.compilation import torch_internals
from pyrovae.compilation.recording import Node, Recording, has_effect

# Operations that compute each element from those at its place, and may write into the memory of an argument.
_ELEMENTWISE = frozenset(
    ["abs", "add", "cos", "div", "erf", "exp", "expm1", "lgamma", "log", "log1p", "mul", "neg", "pow", "reciprocal"]
    + ["relu", "rsqrt", "sigmoid", "sin", "sqrt", "square", "sub", "tanh"]
)
_COMMUTATIVE = frozenset(["add", "mul"])


def play_back(recording: Recording) -> Callable[..., list]:
    """Returns a function that runs the operations of a recording, one after the other, and gives the same bits.

    An operation writes into the memory of an argument that nothing reads later, where it can. The function takes
    `ready` too, which it calls with the place of each tensor among the results, and the tensor, as soon as it is there.
    """
    writer = _Writer(recording)
    exec(compile(writer.source(), "<played back graph>", "exec"), writer.named)
    run = writer.named["run"]
    if recording.changes_inputs:  # autograd counts changes
        return run

    def run_below_autograd(*inputs: Tensor, ready: Callable[[int, Tensor], None] | None = None) -> list:
        with torch_internals.below_autograd():
            return run(*inputs, ready=ready)

    return run_below_autograd


class _Writer:
    """Writes the source of a function that runs the operations of a recording."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.named: dict[str, Any] = {}  # what the source names
        self.names: dict[Node, str] = {x: f"i{i}" for i, x in enumerate(recording.placeholders)}
        self.last_use: dict[Node, Node | None] = {}
        for node in recording.nodes:
            self.last_use.update(dict.fromkeys(node.sources, node))
        self.last_use.update({x: None for x in recording.results if isinstance(x, Node)})
        self.num_views = Counter(node.root for node in (*recording.placeholders, *recording.nodes))

    def source(self) -> str:
        """Returns the source of a function ``run``."""
        lines = [f"def run({', '.join([*self.names.values(), 'ready=None'])}):"]
        finished = self._finished()
        for i, node in enumerate(self.recording.nodes):
            if node.op is operator.getitem:
                call = f"{self._text(node.args[0])}[{node.args[1]}]"
            else:
                call = self._call(node)
            name = self.names[node] = f"v{i}"
            dead = [x for x in dict.fromkeys(node.sources) if self.last_use[x] is node and x.tensor is None]
            dead += [] if node in self.last_use else [node]
            lines.append(f"    {name} = {call}")
            for k in finished.get(i, ()):
                lines.append(f"    if ready: ready({k}, {self.names[self.recording.results[k]]})")
            if dead:
                lines.append(f"    del {', '.join(self.names[x] for x in dead)}")
        lines.append(f"    return {self._text(self.recording.results)}")
        return "\n".join(lines)

    def _finished(self) -> dict[int, list[int]]:
        """Returns the places of results by that of the operation after which they no longer change."""
        places = {node: i for i, node in enumerate(self.recording.nodes)}
        changed: dict[Node, int] = {}  # the last operation that may change a memory
        for i, node in enumerate(self.recording.nodes):
            if node.op is not operator.getitem and has_effect(node.op):
                changed.update((x.root, i) for x in node.sources if x.root is not None)
        finished: dict[int, list[int]] = {}
        for k, x in enumerate(self.recording.results):
            if x in places:
                finished.setdefault(max(places[x], changed.get(x.root, 0)), []).append(k)
        return finished

    def _call(self, node: Node) -> str:
        op, args = node.op, node.args
        arguments = list(args)
        if op._opname in _ELEMENTWISE and not node.kwargs:
            both = op._opname in _COMMUTATIVE and len(args) == 2
            for i, x in enumerate(args[: 2 if both else 1]):
                if self._is_free(x, node):
                    arguments = [x, *(y for j, y in enumerate(args) if j != i)]
                    overload = {"Tensor_Scalar": "Scalar"}.get(op._overloadname, op._overloadname)
                    op = getattr(getattr(torch.ops.aten, f"{op._opname}_"), overload)
                    break
        function = f"f_{op._opname}_{op._overloadname}"
        if function not in self.named:
            self.named[function] = _function_of(op)
        texts = [self._text(x) for x in arguments]
        texts += [f"{key}={self._text(x)}" for key, x in node.kwargs.items()]
        return f"{function}({', '.join(texts)})"

    def _is_free(self, x: Any, node: Node) -> bool:
        """Returns whether a node may write its result into the memory of its argument x."""
        return (
            isinstance(x, Node)
            and x.op is not None
            and x.root is x
            and self.num_views[x] == 1
            and self.last_use[x] is node
            and not has_effect(x.op)
            and x.geometry == node.geometry
            and node.root is node
            and self.num_views[node] == 1
        )

    def _text(self, x: Any) -> str:
        """Returns the source of an argument."""
        if isinstance(x, Node):
            if x not in self.names:  # a constant
                self.names[x] = self._name(x.tensor)
            return self.names[x]
        if isinstance(x, (list, tuple)):
            items = "".join(f"{self._text(item)}, " for item in x)
            return f"({items})" if isinstance(x, tuple) else f"[{items}]"
        if isinstance(x, (int, str, type(None))) or isinstance(x, float) and math.isfinite(x):
            return repr(x)
        return self._name(x)

    def _name(self, x: Any) -> str:
        name = f"c{len(self.named)}"
        self.named[name] = x
        return name


def _function_of(op: Any) -> Callable:
    """Returns the fastest function that runs an operation: one of torch's own, if there is one with the same name."""
    if op.namespace == "aten" and "Tensor?[]" not in str(op._schema):  # torch's own take no None there
        for owner in torch_internals.function_owners:
            if hasattr(owner, op._opname):
                return getattr(owner, op._opname)
    return op._op
