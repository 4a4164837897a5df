"""Recording of what a function computes: the tensor operations that it dispatches, simplified to the bit."""

import operator
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from typing import Any, NamedTuple

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
# The attribute of a tensor that says which node it is of: the numbers of the recording and of the node, and the id of
# the tensor, which a copy of it does not have. It is not the node itself, from which other tensors could be reached:
# Python's collector finds no cycles through autograd.
_NODE = "_pyrovae_node"
_numbers = count()


class FetchesValueError(Exception):
    """A function fetches a value from a tensor, which would be a constant in a graph."""


class Node:
    """An operation of a recording, one of its inputs, or a constant.

    An input has neither an operation nor a tensor; a constant has no operation.

    Args:
        op: the operation; ``operator.getitem`` for one of several results.
        args: its arguments, with nodes for tensors.
        kwargs: its keyword arguments, likewise.
        sources: all nodes among these.
        tensor: the constant.
    """

    __slots__ = (  # a deep model has some hundred thousand
        *("args", "device", "geometry", "kwargs", "op", "root", "same"),
        *("sources", "tensor", "used", "value", "views"),
    )

    def __init__(self, op: Any = None, args: tuple = (), kwargs: Any = None, sources: Any = (), tensor: Any = None):
        self.op, self.args, self.kwargs, self.sources, self.tensor = op, args, kwargs or {}, sources, tensor
        self.root: Node | None = None  # the node that made its memory; None for an operation with several results
        self.views: list[Node] = []  # all nodes whose root it is
        self.geometry: tuple = ()  # what tells views of one memory apart
        self.device: torch.device | None = None
        self.value: Tensor | None = None  # the result, where it is the same in every run
        self.same: Node | None = None  # an earlier node that takes its place
        self.used = False


class Recording(NamedTuple):
    """Operations on tensors.

    Args:
        nodes: the operations, in their order.
        placeholders: the nodes of the inputs.
        inputs: tensors that it takes.
        results: nodes, and leaves that are not tensors.
        changes_inputs: whether it changes inputs in place.
    """

    nodes: list[Node]
    placeholders: list[Node]
    inputs: list[Tensor]
    results: list
    changes_inputs: bool

    def module(self) -> fx.GraphModule:
        """Returns the operations as a module of torch's, called with the inputs."""
        graph = fx.Graph()
        constants: dict[str, Tensor] = {}
        names: dict[Node, fx.Node] = {x: graph.placeholder(f"input_{i}") for i, x in enumerate(self.placeholders)}

        def named(x: Any) -> Any:
            if isinstance(x, Node) and x not in names:
                constants[f"constant_{len(constants)}"] = x.tensor
                names[x] = graph.create_node("get_attr", f"constant_{len(constants) - 1}")
            return names[x] if isinstance(x, Node) else x

        for node in self.nodes:
            args, kwargs = _replaced(node.args, named), _replaced(node.kwargs, named)
            names[node] = graph.call_function(node.op, args, kwargs)
        graph.output(_replaced(self.results, named))
        return fx.GraphModule(constants, graph)

    def constants(self) -> list[Tensor]:
        """Returns the tensors that it holds."""
        read = [*(x for node in self.nodes for x in node.sources), *self.results]
        return [x.tensor for x in dict.fromkeys(read) if isinstance(x, Node) and x.tensor is not None]

    def random_devices(self) -> set[torch.device]:
        """Returns the devices that random numbers are drawn on."""
        return {node.device for node in self.nodes if is_random(node.op) and node.device is not None}


def record(function: Callable[[], list], inputs: list[Tensor]) -> tuple[Recording, list]:
    """Runs a function; returns the operations that it dispatched, with those of its gradients; its result.

    They give the same bits as the function, and are fewer: without what no result needs, what is computed twice, what
    is the same in every run, and views and products that change nothing. Random draws and changes of memory stay, in
    their order.

    Args:
        function: returns a list of tensors and other leaves.
        inputs: tensors that the operations take. Other tensors that the function reads become further inputs. Those
            that no operation reads are left out.

    Raises:
        FetchesValueError: when the function fetches a value that may be another in the next run.
        Untraceable: when the size of a tensor depends on values.
    """
    recorder = _Recorder(inputs)
    try:
        with torch_internals.DispatchMode(recorder.dispatch):
            results = function()
        nodes = [recorder.node_of(x) if isinstance(x, Tensor) else x for x in results]
    finally:
        for t in recorder.inputs:
            delattr(t, _NODE)
    return recorder.simplified(nodes), results


class _Recorder:
    """Collects nodes while a function runs."""

    def __init__(self, inputs: list[Tensor]):
        self.number = next(_numbers)
        self.found: list[Node] = []  # of tensors
        self.nodes: list[Node] = []
        self.inputs: list[Tensor] = []
        self.placeholders: list[Node] = []
        self.changed: set[Node] = set()  # roots whose memory an operation changes
        for t in inputs:
            self._add_input(t)

    def dispatch(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs an operation and adds it to the nodes."""
        if op in _FROM_NUMBERS and self._find(args[0]) is None:
            return self._add_numbers(args[0], op(*args))
        traits = _traits(op)
        sources: list[Node] = []
        tensors: list[Tensor] = []

        def node_of(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            node = self.node_of(x)
            sources.append(node)
            tensors.append(x)
            return node

        arguments, named = _replaced(args, node_of), _replaced(kwargs, node_of) if kwargs else None
        # Found before the operation runs, because some return their argument.
        fixed = traits.may_be_fixed and (traits.shape_only or all(source.value is not None for source in sources))
        if not fixed:
            _check_values(op, traits, args)
        result = op(*args, **kwargs)
        several = isinstance(result, (tuple, list))
        if not several and not isinstance(result, Tensor):
            return result  # a number or a flag that is the same in every run
        node = Node(op, arguments, named, sources)
        self.nodes.append(node)
        if traits.changes:
            for t in _changed_by(op, args, kwargs):
                root = self.node_of(t).root
                assert root is not None
                self.changed.add(root)
                for view in root.views:
                    view.value = None
                fixed = False
        if not several:
            self._add(node, result, sources, tensors, fixed)
            return result
        for i, t in enumerate(result):
            if isinstance(t, Tensor):
                item = Node(operator.getitem, (node, i), None, [node])
                self.nodes.append(item)
                self._add(item, t, sources, tensors, fixed)
        return result

    def _find(self, t: Tensor) -> Node | None:
        number, i, tensor_id = vars(t).get(_NODE, (None, 0, 0))
        return self.found[i] if number == self.number and tensor_id == id(t) else None

    def node_of(self, t: Tensor) -> Node:
        """Returns the node of a tensor, which becomes an input if no operation made it."""
        return self._find(t) or self._add_input(t)

    def _add_input(self, t: Tensor) -> Node:
        node = Node()
        self.inputs.append(t)
        self.placeholders.append(node)
        return self._add(node, t)

    def _add_numbers(self, t: Tensor, result: Tensor) -> Tensor:
        fixed = t.untyped_storage().nbytes() <= _MAX_NUMBERS_BYTES
        node = Node(tensor=t.clone() if fixed else t)
        self.nodes.append(node)
        self._add(node, result, fixed=fixed)
        return result

    def _add(self, node: Node, t: Tensor, sources: Any = (), tensors: Any = (), fixed: bool = False) -> Node:
        storage = t.untyped_storage()
        node.root = node
        for source, other in zip(sources, tensors, strict=True):
            if other is t or other.untyped_storage()._cdata == storage._cdata:
                node.root = source.root
                break
        assert node.root is not None
        node.root.views.append(node)
        node.device = t.device
        node.geometry = (t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())
        if fixed and storage.nbytes() <= _MAX_CONSTANT_BYTES:
            node.value = t
        setattr(t, _NODE, (self.number, len(self.found), id(t)))
        self.found.append(node)
        return node

    def simplified(self, results: list) -> Recording:
        """Returns the recording, with nodes replaced by earlier ones that hold the same bits, and what is needed."""
        seen: dict[Any, Node] = {}
        for node in self.placeholders:
            seen[node.root, node.geometry] = node
        for node in self.nodes:
            if any(source.same is not None for source in node.sources):
                node.args, node.kwargs = _replaced(node.args, _kept), _replaced(node.kwargs, _kept)
                node.sources = [_kept(source) for source in node.sources]
            if node.op is None:
                if node.root in self.changed:  # which the function makes anew from numbers, and changes
                    constant = Node(tensor=node.tensor)
                    node.op, node.args, node.sources, node.tensor = _aten.clone.default, (constant,), [constant], None
            elif node.value is None:
                node.same = self._earlier(node, seen)
                if node.same is not None:
                    _share_memory(node, node.same)
        results = _replaced(results, _kept)
        for result in results:
            if isinstance(result, Node):
                _use(result)
        nodes = [node for node in reversed(self.nodes) if _is_needed(node)][::-1]
        read = [(x, t) for x, t in zip(self.placeholders, self.inputs, strict=True) if x.used]
        changes_inputs = any(root.op is None and root.tensor is None for root in self.changed)
        return Recording(nodes, [x for x, _ in read], [t for _, t in read], results, changes_inputs)

    def _earlier(self, node: Node, seen: dict[Any, Node]) -> Node | None:
        """Returns an earlier node with the same bits, or None; notes the node for later ones."""
        if has_effect(node.op):
            return None
        if node.root is not None:
            place = (node.root, node.geometry)
            if place in seen:  # a view of the same elements
                return seen[place]
            seen[place] = node
        if self.changed and (node.root in self.changed or any(source.root in self.changed for source in node.sources)):
            return None
        if node.op in _NEUTRAL and not node.kwargs:
            x, number = node.args
            is_neutral = isinstance(number, (int, float)) and number == _NEUTRAL[node.op]
            if is_neutral and isinstance(x, Node) and x.geometry[1:] == node.geometry[1:]:
                return x
        same = seen.setdefault((node.op, _key(node.args), _key(node.kwargs)), node)
        return None if same is node else same


def _kept(x: Any) -> Any:
    """Returns the node that takes the place of a node; anything else as it is."""
    return x.same if isinstance(x, Node) and x.same is not None else x


def _share_memory(node: Node, same: Node) -> None:
    """Makes the views of a node's memory views of that of another, which takes its place."""
    if node.root is not node:
        return
    assert same.root is not None
    moved = same.geometry[0] - node.geometry[0]
    for view in node.views:
        view.root, view.geometry = same.root, (view.geometry[0] + moved, *view.geometry[1:])
    same.root.views += node.views


def _use(node: Node) -> None:
    """Notes that a node is needed. What is the same in every run becomes a constant."""
    if not node.used and node.value is not None and node.op is not None:
        node.op, node.args, node.kwargs, node.sources, node.tensor = None, (), {}, (), node.value
    node.used = True


def _is_needed(node: Node) -> bool:
    """Returns whether an operation is needed; notes then that what it reads is needed."""
    if node.op is None or not node.used and not has_effect(node.op):
        return False
    for source in node.sources:
        _use(source)
    return True


class _Traits(NamedTuple):
    """What is known of an operation.

    Args:
        may_be_fixed: whether it gives the same result for the same arguments.
        shape_only: whether its result depends on the shape of its argument only.
        changes: whether it changes an argument in place.
        has_effect: whether it does more than to return a result.
        is_random: whether it draws random numbers.
        fetches: whether it returns a value that depends on values.
        sizes: whether the size of its result depends on values.
    """

    may_be_fixed: bool
    shape_only: bool
    changes: bool
    has_effect: bool
    is_random: bool
    fetches: bool
    sizes: bool


@cache
def _traits(op: Any) -> _Traits:
    tags, name = getattr(op, "tags", ()), getattr(op, "_opname", "")
    random = torch.Tag.nondeterministic_seeded in tags
    changes = _changes_statistics(op) or (hasattr(op, "_schema") and op._schema.is_mutable)
    return _Traits(
        may_be_fixed=not random and "empty" not in name,
        shape_only=name in _SHAPE_ONLY,
        changes=changes,
        has_effect=changes or random,
        is_random=random,
        fetches=torch.Tag.data_dependent_output in tags,
        sizes=torch.Tag.dynamic_output_shape in tags,
    )


def is_random(op: Any) -> bool:
    """Returns whether an operation draws random numbers."""
    return _traits(op).is_random


def has_effect(op: Any) -> bool:
    """Returns whether an operation does more than to return a result: draws random numbers or changes a tensor."""
    return _traits(op).has_effect


def _changes_statistics(op: Any) -> bool:
    # The running mean and variance, which its schema does not say.
    return getattr(op, "_opname", "").endswith("batch_norm")


def _changed_by(op: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors that an operation changes in place."""
    for i, argument in enumerate(op._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written or _changes_statistics(op) and argument.name.startswith("running"):
            yield from (t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor))


def _check_values(op: Any, traits: _Traits, args: tuple) -> None:
    """Raises if a result of an operation that is not a tensor, or the size of one, depends on values."""
    if traits.fetches:
        raise FetchesValueError(str(op))
    if traits.sizes:
        indices = args[1] if op is _aten.index.Tensor else []
        if not indices or any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices):
            raise Untraceable("the size of a tensor depends on values, as in x[x > 0]: use torch.where or poutine.mask")


def _replaced(x: Any, function: Callable[[Any], Any]) -> Any:
    """Returns nested lists, tuples and dicts with each leaf replaced by what a function returns."""
    if isinstance(x, (tuple, list)):
        return type(x)([_replaced(item, function) for item in x])
    if isinstance(x, dict):
        return {key: _replaced(value, function) for key, value in x.items()}
    return function(x)


def _key(x: Any) -> Any:
    """Returns a hashable key, different for arguments of different types such as 1, 1.0 and True."""
    if isinstance(x, Node):
        return x
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(_key, x))
    if isinstance(x, dict):
        return tuple((name, _key(value)) for name, value in x.items())
    return type(x), x
