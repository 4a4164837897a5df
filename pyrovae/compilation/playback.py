"""Playing a graph back: its operations one after the other, without Python handlers, autograd or a compiler."""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyrovae.compilation import torch_internals
from pyrovae.compilation.recording import Recording, has_effect

# Operations that compute each element from those at its place, and may write into the memory of an argument.
_ELEMENTWISE = frozenset(
    ["abs", "add", "cos", "div", "erf", "exp", "expm1", "lgamma", "log", "log1p", "mul", "neg", "pow", "reciprocal"]
    + ["relu", "rsqrt", "sigmoid", "sin", "sqrt", "square", "sub", "tanh"]
)
_COMMUTATIVE = frozenset(["add", "mul"])


def play_back(recording: Recording) -> Callable[..., list]:
    """Returns a function that runs the operations of a graph, one after the other, and gives the same bits.

    An operation writes into the memory of an argument that nothing reads later, where it can.
    """
    names: dict[str, Any] = {}
    source = "\n".join(_lines(recording, names))
    exec(compile(source, "<played back graph>", "exec"), names)
    run = names["run"]
    if recording.changes_inputs:  # autograd counts changes
        return run

    def run_below_autograd(*inputs: Tensor) -> list:
        with torch_internals.below_autograd():
            return run(*inputs)

    return run_below_autograd


def _lines(recording: Recording, names: dict[str, Any]) -> list[str]:
    """Returns the source of a function ``run``; adds what it names to `names`."""
    nodes = list(recording.graph.nodes)
    last_use: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last_use.update(dict.fromkeys(node.all_input_nodes, node))
    num_views = Counter(node.meta["root"] for node in nodes if "root" in node.meta)
    inputs: list[str] = []
    lines = ["def run({}):"]
    for i, node in enumerate(nodes):
        name = f"v{i}"
        if node.op == "placeholder":
            inputs.append(name)
        elif node.op == "get_attr":
            names[name] = recording.constants[node.target]
        elif node.op == "output":
            lines.append(f"    return {_text(list(node.args[0]), names)}")
        elif node.target is operator.getitem:
            lines.append(f"    {name} = {_text(node.args[0], names)}[{node.args[1]}]")
        else:
            lines.append(f"    {name} = {_call(node, names, last_use, num_views)}")
        node.meta["name"] = name
        if node.op == "call_function":
            dead = [other.meta["name"] for other in node.all_input_nodes if last_use[other] is node]
            dead = [x for x in dead if x not in names]  # constants stay
            dead += [name] if node not in last_use else []
            if dead:
                lines.append(f"    del {', '.join(dead)}")
    lines[0] = lines[0].format(", ".join(inputs))
    return lines


def _call(node: fx.Node, names: dict[str, Any], last_use: dict, num_views: Counter) -> str:
    op: Any = node.target
    args = node.args
    arguments = list(args)
    if op._opname in _ELEMENTWISE and not node.kwargs:
        both = op._opname in _COMMUTATIVE and len(args) == 2
        for i, x in enumerate(args[: 2 if both else 1]):
            if _is_free(x, node, last_use, num_views):
                arguments = [x, *(y for j, y in enumerate(args) if j != i)]
                overload = {"Tensor_Scalar": "Scalar"}.get(op._overloadname, op._overloadname)
                op = getattr(getattr(torch.ops.aten, f"{op._opname}_"), overload)
                break
    function = f"f_{op._opname}_{op._overloadname}"
    names[function] = _function_of(op)
    texts = [_text(x, names) for x in arguments]
    texts += [f"{key}={_text(x, names)}" for key, x in node.kwargs.items()]
    return f"{function}({', '.join(texts)})"


def _is_free(x: Any, node: fx.Node, last_use: dict, num_views: Counter) -> bool:
    """Returns whether a node may write its result into the memory of its argument x."""
    return (
        isinstance(x, fx.Node)
        and x.op == "call_function"
        and x.meta["root"] is x
        and num_views[x] == 1
        and last_use[x] is node
        and not has_effect(x.target)
        and x.meta["geometry"] == node.meta["geometry"]
        and node.meta["root"] is node
        and num_views[node] == 1
    )


def _function_of(op: Any) -> Callable:
    """Returns the fastest function that runs an operation: one of torch's own, if there is one with the same name."""
    name = op._opname
    if op.namespace == "aten" and "Tensor?[]" not in str(op._schema):  # torch's own take no None there
        for owner in torch_internals.function_owners:
            if hasattr(owner, name):
                return getattr(owner, name)
    return op._op


def _text(x: Any, names: dict[str, Any]) -> str:
    """Returns the source of an argument."""
    if isinstance(x, fx.Node):
        return x.meta["name"]
    if isinstance(x, (list, tuple)):
        items = "".join(f"{_text(item, names)}, " for item in x)
        return f"({items})" if isinstance(x, tuple) else f"[{items}]"
    if isinstance(x, (int, str, type(None))):
        return repr(x)
    name = f"c{len(names)}"
    names[name] = x
    return name
