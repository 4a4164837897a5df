"""The state that a function can reach: what may change from one call to the next without being an argument."""

import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

# Code that reads no state but that of the objects it is given. All other functions and classes are the user's.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "pyro", "pyrovae", "numpy", "zuko", "torchvision", "tqdm"})
ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range, slice)
_OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType, Messenger, Trace, torch.Generator)
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = operator.attrgetter("_forward_pre_hooks", "_forward_hooks")
_MOST = 20_000


class Untraceable(Exception):
    """Why something cannot be made a graph, or should not be."""


class State:
    """All that can be reached from some objects: tensors, and what else there is, to be told apart from what it is later.

    It goes through attributes, elements of containers, closures, the global variables that the code of functions and
    classes names, and parameters of Pyro's store. Code of well-known libraries is taken to read only what it is given;
    attributes of Pyro's handlers are not looked at.

    Args:
        roots: the objects.
        params: names of parameters in Pyro's store.
        skip: names of attributes that are not looked at, for objects of a class.

    Raises:
        Untraceable: when there are too many objects to look at.

    >>> layer = nn.Dropout(0.5)
    >>> state = State((layer,))
    >>> state.change((layer,))
    >>> _ = layer.eval()
    >>> state.change((layer,))
    'Dropout.training changed from True to False'
    """

    def __init__(
        self, roots: tuple, params: Sequence[str] = (), skip: Mapping[type, frozenset[str]] = types.MappingProxyType({})
    ):
        self.roots, self.params, self.skip = roots, tuple(params), skip
        self.tensors: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._names: list[str] = []
        self._seen: dict[Any, Any] = {}  # with the objects, so that an identity stays taken
        if params:
            self._watch("pyro.param", pyro.get_param_store()._params, self.params)
        for root in roots:
            self._visit(getattr(root, "__qualname__", type(root).__name__), root)
        self._kinds = [tensor_kind(t) for t in self.tensors]
        self.leaves = [t for t in self.tensors if t.requires_grad and t.is_leaf]

    def change(self, roots: tuple) -> str | None:
        """Returns what is no longer as it was, for a message; None if all is."""
        if not _alike(self.roots, roots):
            return "the model, the guide or an argument became another object"
        for slot in self._slots:
            change = slot.change()
            if change is not None:
                return change
        for name, kind, t in zip(self._names, self._kinds, self.tensors, strict=True):
            if tensor_kind(t) != kind:
                return f"{name} changed its shape, type, device or requires_grad"
        return None

    @property
    def told(self) -> tuple:
        """What two states that differ in nothing but their tensors have in common, hashable."""
        return tuple(
            (slot.where, *(x if isinstance(x, ATOMS) else type(x) for x in slot.saved)) for slot in self._slots
        )

    def _visit(self, where: str, x: Any) -> None:
        if isinstance(x, (*ATOMS, *_OPAQUE)) or id(x) in self._seen:
            return
        self._seen[id(x)] = x
        if isinstance(x, Tensor):
            self.tensors.append(x)
            self._names.append(where)
        elif isinstance(x, types.MethodType):
            self._visit(type(x.__self__).__name__, x.__self__)
            self._visit(where, x.__func__)
        elif isinstance(x, types.FunctionType):
            self._visit_function(x)
        elif isinstance(x, partial):
            self._visit(where, [x.func, x.args, x.keywords])
        elif isinstance(x, dict):
            self._watch(where, x, None)
        elif isinstance(x, (list, tuple, set, frozenset)):
            self._add(_Slot(where, lambda: x, range(len(x))))
        elif isinstance(x, nn.Module):
            where = type(x).__name__
            self._visit_class(type(x))
            self._watch(where, vars(x), tuple(name for name in vars(x) if name not in _MODULE_INTERNALS | self._skipped(x)))
            for entries in filter(None, (x._parameters, x._buffers, x._modules)):
                self._watch(where, entries, None)
            self._add(_Slot(where, lambda: tuple(map(len, _HOOKS(x))), ("pre-hooks", "hooks")))
            self.buffers += [b for b in x._buffers.values() if b is not None]
        else:
            self._visit_class(type(x))
            if hasattr(x, "__dict__"):
                skipped = self._skipped(x)
                self._watch(where, vars(x), tuple(name for name in vars(x) if name not in skipped) if skipped else None)

    def _visit_class(self, kind: type) -> None:
        for cls in kind.__mro__:
            if _is_library(cls) or cls in self._seen:
                continue
            self._seen[cls] = cls
            attributes = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
            for value in [*attributes.values(), vars(cls).get("__call__")]:
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(function, types.FunctionType):
                    self._visit_function(function)
            self._watch(cls.__name__, vars(cls), tuple(n for n, v in attributes.items() if isinstance(v, ATOMS)))

    def _visit_function(self, f: types.FunctionType) -> None:
        where = f.__qualname__
        if f.__closure__:
            cells = f.__closure__
            self._add(_Slot(where, lambda: [_content(cell) for cell in cells], f.__code__.co_freevars))
        for defaults in filter(None, (f.__defaults__, f.__kwdefaults__)):
            self._visit(f"a default of {where}", defaults)
        if _is_library(f):
            return
        names = frozenset(_names_in(f.__code__))
        here = tuple(sorted(names & f.__globals__.keys()))
        if here and (f.__module__, here) not in self._seen:
            self._seen[f.__module__, here] = f
            self._watch(str(f.__module__), f.__globals__, here)
        for name in here:
            value = f.__globals__[name]
            if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in _LIBRARIES:
                self._watch(name, vars(value), tuple(sorted(names & vars(value).keys())))

    def _watch(self, where: str, entries: Mapping[str, Any], names: tuple | None) -> None:
        """Watches entries of a mapping, all unless they are named."""
        if names is None:
            self._add(_Slot(where, entries.values, tuple(entries)))
        elif names:
            self._add(_Slot(where, lambda: [entries.get(name) for name in names], names))

    def _add(self, slot: "_Slot") -> None:
        if len(self._slots) == _MOST:
            raise Untraceable(f"more than {_MOST:,} objects can be reached, too many to watch for changes")
        self._slots.append(slot)
        for name, value in zip(slot.names, slot.saved, strict=True):
            self._visit(slot.place(name), value)

    def _skipped(self, x: Any) -> frozenset[str]:
        return next((names for kind, names in self.skip.items() if isinstance(x, kind)), frozenset())


class _Slot:
    """Values that were read from one place, and how to read them again."""

    def __init__(self, where: str, read: Callable[[], Iterable], names: Sequence):
        self.where, self.read, self.names = where, read, names
        self.saved = tuple(read())

    def change(self) -> str | None:
        """Returns what is no longer as it was; None if all is."""
        values = self.read()
        if len(values) != len(self.saved):
            return f"{self.where} has {len(values)} entries, and had {len(self.saved)}"
        if all(map(operator.is_, values, self.saved)):
            return None
        for name, old, new in zip(self.names, self.saved, values, strict=True):
            if not _alike(old, new):
                told = isinstance(old, ATOMS) and isinstance(new, ATOMS)
                return f"{self.place(name)} changed" + (f" from {old!r} to {new!r}" if told else "")
        return None

    def place(self, name: Any) -> str:
        return f"{self.where}.{name}" if isinstance(name, str) else f"{self.where}[{name!r}]"


def tensor_kind(t: Tensor) -> tuple:
    """Returns what about a tensor a graph is made for."""
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad


def _alike(old: Any, new: Any) -> bool:
    """Returns whether one value may stand for another: the same object, or one that cannot be told from it."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, ATOMS):
        return old == new or (old != old and new != new)  # NaN
    if isinstance(old, types.MethodType):
        return old == new
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(_alike, old, new))
    return isinstance(old, (list, dict, set)) and not old and not new


def _is_library(x: Any) -> bool:
    return str(x.__module__).partition(".")[0] in _LIBRARIES


def _names_in(code: types.CodeType) -> Iterable[str]:
    """Returns the names that code and the functions inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
