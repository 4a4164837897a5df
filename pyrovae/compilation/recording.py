"""Recording of what a function computes: a graph of the tensor operations that it dispatched, simplified to the bit."""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from pyrovae.compilation import torch_internals
from pyrovae.inference.messages import Untraceable

# What is the same in every run is computed once, when a graph is made, unless it takes more memory than this.
_MAX_CONSTANT_BYTES = 2**24
# A tensor that a run makes from numbers is the same in every run up to this size. A larger one may share memory with a
# NumPy array that no guard compares, and is read again in every run.
_MAX_NUMBERS_BYTES = 8192

_aten = torch.ops.aten
_FROM_NUMBERS = (_aten.lift_fresh.default, _aten.lift.default)
# Their results depend on the shape of their first argument, not on its values.
_SHAPE_ONLY = ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
# Operations with one of these numbers as second argument return the first argument, to the bit.
_NEUTRAL = {
    _aten.mul.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Tensor: 1,
    _aten.div.Scalar: 1,
    _aten.sub.Tensor: 0,
    _aten.pow.Tensor_Scalar: 1,
}


class FetchesValueError(Exception):
    """A function fetches a value from a tensor, which would be a constant in a graph."""


class Recording:
    """A graph of tensor operations.

    Args:
        graph: with a placeholder for each input.
        inputs: tensors that it takes.
        constants: tensors that it holds, by the names of its attributes.
        changes_inputs: whether it changes inputs in place.
    """

    def __init__(self, graph: fx.Graph, inputs: list[Tensor], constants: dict[str, Tensor], changes_inputs: bool):
        self.graph, self.inputs, self.constants, self.changes_inputs = graph, inputs, constants, changes_inputs

    def module(self) -> fx.GraphModule:
        """Returns the graph as a module, called with the inputs."""
        return fx.GraphModule(self.constants, self.graph)

    def drop_unused_inputs(self) -> None:
        """Drops the inputs that no operation reads."""
        placeholders = self.graph.find_nodes(op="placeholder")
        self.inputs = [t for node, t in zip(placeholders, self.inputs, strict=True) if node.users]
        for node in placeholders:
            if not node.users:
                self.graph.erase_node(node)

    def random_devices(self) -> set[torch.device]:
        """Returns the devices that random numbers are drawn on."""
        return {node.meta["device"] for node in self.graph.nodes if is_random(node.target) and "device" in node.meta}


def record(function: Callable[[], list], inputs: list[Tensor]) -> tuple[Recording, list]:
    """Runs a function; returns a graph of the operations that it dispatched, with those of its gradients; its result.

    The graph gives the same bits as the function, in fewer operations: without what no result needs, what is computed
    twice, what is the same in every run, and views and products that change nothing. Random draws and changes of memory
    stay, in their order.

    Args:
        function: returns a list of tensors and other leaves, which the graph returns.
        inputs: tensors that the graph takes. Other tensors that the function reads become further inputs.

    Raises:
        FetchesValueError: when the function fetches a value that may be another in the next run.
        Untraceable: when the size of a tensor depends on values.
    """
    recorder = _Recorder(inputs)
    with torch_internals.DispatchMode(recorder.dispatch):
        results = function()
    recorder.graph.output([recorder.node_of(x) if isinstance(x, Tensor) else x for x in results])
    recorder.simplify()
    changes_inputs = any(root.op == "placeholder" for root in recorder.changed)
    return Recording(recorder.graph, recorder.inputs, recorder.constants, changes_inputs), results


class _Recorder:
    """Builds the graph while a function runs.

    Nodes hold in `meta`: "root", the node that made the memory of theirs; "geometry", what tells views of one memory
    apart; "value", the result, where it is the same in every run.
    """

    def __init__(self, inputs: list[Tensor]):
        self.graph = fx.Graph()
        self.inputs: list[Tensor] = []
        self.constants: dict[str, Tensor] = {}
        self.nodes = torch_internals.TensorDictionary()  # of the tensors that are alive
        self.sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # the nodes that have a root
        self.changed: set[fx.Node] = set()  # roots whose memory an operation changes
        self.last_placeholder: fx.Node | None = None
        for t in inputs:
            self._add_input(t)

    def dispatch(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs an operation and adds it to the graph."""
        if op in _FROM_NUMBERS and args[0] not in self.nodes:
            return self._add_numbers(args[0], op(*args))
        tensors = list(_tensors((args, kwargs)))
        nodes = list(map(self.node_of, tensors))
        # Found before the operation runs, because some return their argument.
        fixed = all("value" in node.meta for node in nodes) or op._opname in _SHAPE_ONLY
        fixed = fixed and not is_random(op) and "empty" not in op._opname
        if not fixed:
            _check_values(op, args)
        arguments, named = self._with_nodes(args), self._with_nodes(kwargs)
        result = op(*args, **kwargs)
        if not any(isinstance(t, Tensor) for t in (result if isinstance(result, (tuple, list)) else [result])):
            return result  # a number or a flag that is the same in every run
        node = self.graph.call_function(op, arguments, named)
        for t in _changed_by(op, args, kwargs):
            root = self.node_of(t).meta["root"]
            self.changed.add(root)
            for other in self.sharing[root]:
                other.meta.pop("value", None)
            fixed = False
        if isinstance(result, Tensor):
            self._add(node, result, tensors, fixed)
            return result
        for i, t in enumerate(result):
            if isinstance(t, Tensor):
                self._add(self.graph.call_function(operator.getitem, (node, i)), t, tensors, fixed)
        return result

    def node_of(self, t: Tensor) -> fx.Node:
        """Returns the node of a tensor, which becomes an input if no operation made it."""
        node = self.nodes.get(t)
        return self._add_input(t) if node is None else node

    def _add_input(self, t: Tensor) -> fx.Node:
        with self.graph.inserting_after(self.last_placeholder):
            node = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.inputs.append(t)
        self.last_placeholder = node
        return self._add(node, t)

    def _add_numbers(self, t: Tensor, result: Tensor) -> Tensor:
        fixed = _num_bytes(t) <= _MAX_NUMBERS_BYTES
        self._add(self._constant(t.clone() if fixed else t), result, fixed=fixed)
        return result

    def _constant(self, t: Tensor) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = t
        return self.graph.create_node("get_attr", name)

    def _add(self, node: fx.Node, t: Tensor, sources: list[Tensor] = [], fixed: bool = False) -> fx.Node:  # noqa: B006
        storage = _storage(t)
        shared = next((s for s in sources if _storage(s) == storage), None)
        root = node if shared is None else self.node_of(shared).meta["root"]
        node.meta.update(root=root, geometry=_geometry(t), device=t.device)
        if fixed and _num_bytes(t) <= _MAX_CONSTANT_BYTES:
            node.meta["value"] = t
        self.sharing[root].append(node)
        self.nodes[t] = node
        return node

    def _with_nodes(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.node_of(x)
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._with_nodes, x))
        if isinstance(x, dict):
            return {key: self._with_nodes(value) for key, value in x.items()}
        return x

    def simplify(self) -> None:
        """Replaces nodes by earlier ones that hold the same bits, and drops what no result needs."""
        seen: dict[Any, fx.Node] = {}
        for node in [*self.graph.nodes]:
            if node.op == "output":
                continue
            meta = node.meta
            if meta.get("root") in self.changed and node.op == "get_attr":
                # The function changes a tensor that each run makes anew from numbers.
                with self.graph.inserting_after(node):
                    copy = self.graph.call_function(_aten.clone.default, (node,))
                copy.meta.update(meta)
                node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
                node, meta = copy, copy.meta
            if "value" in meta and node.op == "call_function":
                if all("value" in user.meta for user in node.users):
                    continue  # nothing but constants is made of it
                with self.graph.inserting_before(node):
                    constant = self._constant(meta["value"])
                constant.meta.update(meta)
                node.replace_all_uses_with(constant)
                continue
            same = self._earlier(node, seen)
            if same is not None:
                node.replace_all_uses_with(same)
                self._share_memory(node, same)
        self._drop_unused()

    def _share_memory(self, node: fx.Node, same: fx.Node) -> None:
        """Makes the views of a node's memory views of that of another, which takes its place."""
        if node.meta.get("root") is not node:
            return
        root, moved = same.meta["root"], same.meta["geometry"][0] - node.meta["geometry"][0]
        for view in self.sharing[node]:
            offset, *others = view.meta["geometry"]
            view.meta.update(root=root, geometry=(offset + moved, *others))
        self.sharing[root] += self.sharing.pop(node)

    def _earlier(self, node: fx.Node, seen: dict[Any, fx.Node]) -> fx.Node | None:
        """Returns an earlier node with the same bits, or None; notes the node for later ones."""
        if node.op != "call_function":
            if "root" in node.meta:
                seen.setdefault((node.meta["root"], node.meta["geometry"]), node)
            return None
        if has_effect(node.target):
            return None
        root = node.meta.get("root")  # None for an operation with several results
        if root is not None:
            place = (root, node.meta["geometry"])
            if place in seen:  # a view of the same elements
                return seen[place]
            seen[place] = node
        touched = {root, *(n.meta.get("root") for n in node.all_input_nodes)}
        if touched & self.changed:
            return None
        if node.target in _NEUTRAL and not node.kwargs:
            x, number = node.args
            is_neutral = isinstance(number, (int, float)) and number == _NEUTRAL[node.target]
            if is_neutral and isinstance(x, fx.Node) and x.meta["geometry"][1:] == node.meta["geometry"][1:]:
                return x
        same = seen.setdefault(_key((node.target, node.args, dict(node.kwargs))), node)
        return None if same is node else same

    def _drop_unused(self) -> None:
        for node in reversed(self.graph.nodes):
            if not node.users and node.op in ("call_function", "get_attr") and not has_effect(node.target):
                self.graph.erase_node(node)
        used = {node.target for node in self.graph.find_nodes(op="get_attr")}
        self.constants = {name: t for name, t in self.constants.items() if name in used}


def is_random(op: Any) -> bool:
    """Returns whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


def has_effect(op: Any) -> bool:
    """Returns whether an operation does more than to return a result: draws random numbers or changes a tensor."""
    schema = getattr(op, "_schema", None)
    return schema is not None and (schema.is_mutable or is_random(op) or _changes_statistics(op))


def _changes_statistics(op: Any) -> bool:
    return op._opname.endswith("batch_norm")  # the running mean and variance, which its schema does not say


def _changed_by(op: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors that an operation changes in place."""
    if not op._schema.is_mutable and not _changes_statistics(op):
        return
    for i, argument in enumerate(op._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written or _changes_statistics(op) and argument.name.startswith("running"):
            yield from _tensors(value)


def _check_values(op: Any, args: tuple) -> None:
    """Raises if a result of an operation that is not a tensor, or the size of one, depends on values."""
    if torch.Tag.data_dependent_output in op.tags:
        raise FetchesValueError(str(op))
    if torch.Tag.dynamic_output_shape in op.tags:
        masks = [t for t in _tensors(args[1:]) if t.dtype in (torch.bool, torch.uint8)]
        if op is not _aten.index.Tensor or masks:
            raise Untraceable("the size of a tensor depends on values, as in x[x > 0]: use torch.where or poutine.mask")


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _tensors(item)
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _num_bytes(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def _geometry(t: Tensor) -> tuple:
    return t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()


def _key(x: Any) -> Any:
    """Returns a hashable key, different for arguments of different types such as 1, 1.0 and True."""
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(_key, x))
    if isinstance(x, dict):
        return tuple((name, _key(value)) for name, value in x.items())
    return type(x), x
