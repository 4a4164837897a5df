"""The state that a function can reach: what may change from one call to the next without being an argument."""

import gc
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyrovae.inference.messages import Untraceable

# Code that reads no state but that of the objects it is given. All other functions and classes are the user's.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "pyro", "pyrovae", "numpy", "zuko", "torchvision", "tqdm"})
ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range, slice)
_Cached = type(lru_cache(int))
_OPAQUE = (types.BuiltinFunctionType, types.CodeType, TraceMessenger, Trace, torch.Generator)
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_MODULE_ENTRIES = operator.attrgetter("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
_ENTRIES = ("parameters", "buffers", "modules", "pre-hooks", "hooks")
_MOST = 20_000
_SMALL = 8192  # bytes of an array that are compared


class Guards:
    """All that can be reached from some objects: tensors, and what else there is, to be told apart from what it is later.

    It goes through attributes, elements of containers, closures, the global variables that the code of functions and
    classes names, and parameters of Pyro's store. Code of well-known libraries is taken to read only what it is given.

    Args:
        roots: the objects.
        params: names of parameters in Pyro's store.
        skip: names of attributes that are not looked at, for objects of a class.

    Raises:
        Untraceable: when there are too many objects to look at, or a parameter has a hook that no graph can call.

    >>> layer = nn.Dropout(0.5)
    >>> state = Guards((layer,))
    >>> state.failure_reason((layer,))
    >>> _ = layer.eval()
    >>> state.failure_reason((layer,))
    'Dropout.training changed from True to False'
    """

    def __init__(
        self, roots: tuple, params: Sequence[str] = (), skip: Mapping[type, frozenset[str]] = types.MappingProxyType({})
    ):
        self.roots, self.params, self.skip = roots, tuple(params), skip
        self.tensors: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._slots: list[_Slot] = []
        self._counted: list[Mapping] = []
        self._counted_names: list[str] = []
        self._names: list[str] = []
        self._seen: dict[Any, Any] = {}  # with the objects, so that an identity stays taken
        self._code: set[str] = set()  # names that code looks up, anywhere
        self._modules: list[types.ModuleType] = []
        if params:
            store = pyro.get_param_store()
            self._add(_Slot("pyro.param", lambda: [store._params.get(name) for name in self.params], self.params))
        for root in roots:
            self._visit(getattr(root, "__qualname__", type(root).__name__), root)
        for module in self._modules:  # which grow on the way
            self._watch(module.__name__, vars(module), tuple(sorted(self._code & vars(module).keys())))
        self._kinds = [tensor_kind(t) for t in self.tensors]
        self.leaves = [t for t in self.tensors if t.requires_grad and t.is_leaf]
        if any(t._post_accumulate_grad_hooks for t in self.leaves):
            raise Untraceable("a parameter has a hook that is called when its gradient is there")
        hooks = [f"the number of hooks of the gradient of parameter {i}" for i in range(len(self.leaves))]
        self._add(_Slot("", self._counts, [*self._counted_names, *hooks]))
        self._reads = [slot.read for slot in self._slots]
        self._saved = [value for slot in self._slots for value in slot.saved]

    def _counts(self) -> list[int]:
        return [*map(len, self._counted), *(len(t._backward_hooks or ()) for t in self.leaves)]

    def failure_reason(self, roots: tuple) -> str | None:
        """Returns what is no longer as it was, for a message; None if all is."""
        if not _alike(self.roots, roots):
            return "the model, the guide or an argument became another object"
        if not self._is_the_same():
            for slot in self._slots:
                change = slot.failure_reason()
                if change is not None:
                    return change
        for name, kind, t in zip(self._names, self._kinds, self.tensors, strict=True):
            if tensor_kind(t) != kind:
                return f"{name} changed its shape, type, device or requires_grad"
        return None

    def _is_the_same(self) -> bool:
        """Returns whether all values are the very same objects: quickly, for that is so in nearly all steps.

        What moved from the end of one container to the start of the next shows in how many entries they have.
        """
        values = []
        try:
            for read in self._reads:
                values += read()
        except KeyError:
            return False
        return len(values) == len(self._saved) and all(map(operator.is_, values, self._saved))

    @property
    def fingerprint(self) -> tuple:
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
        elif isinstance(x, type):
            self._visit_class(x)
        elif isinstance(x, types.ModuleType):
            if x.__name__.partition(".")[0] not in _LIBRARIES:
                self._modules.append(x)
        elif isinstance(x, types.MethodType):
            self._visit(type(x.__self__).__name__, x.__self__)
            self._visit(where, x.__func__)
        elif isinstance(x, types.FunctionType):
            self._visit_function(x)
        elif isinstance(x, _Cached):  # what it keeps; other results are of other arguments
            for kept in gc.get_referents(x):
                for result in kept.values() if isinstance(kept, dict) else [kept]:
                    self._visit(where, result)
        elif isinstance(x, partial):
            self._visit(where, [x.func, x.args, x.keywords])
        elif isinstance(x, dict):
            self._add(_Slot(where, lambda: [*x, *x.values()], [*(f"the key {key!r}" for key in x), *x]))
            self._count(where, "entries", x)
        elif isinstance(x, (list, tuple, set, frozenset, deque)):
            self._add(_Slot(where, lambda: x, range(len(x))))
            self._count(where, "entries", x)
        elif isinstance(x, np.ndarray):
            if x.nbytes <= _SMALL:
                self._add(_Slot(where, lambda: [x.tobytes()], ["content"]))
        elif isinstance(x, nn.Module):
            where = type(x).__name__
            self._visit_class(type(x))
            self._watch_attributes(where, x, _MODULE_INTERNALS | self._skipped(x))
            for name, entries in zip(_ENTRIES, _MODULE_ENTRIES(x), strict=True):
                self._watch(where, entries, tuple(entries))
                self._count(where, name, entries)
            self.buffers += [b for b in x._buffers.values() if b is not None]
        else:
            self._visit_class(type(x))
            if hasattr(x, "__dict__"):
                self._watch_attributes(where, x, self._skipped(x))
            slots = [
                name
                for cls in type(x).__mro__
                for name in _as_tuple(vars(cls).get("__slots__", ()))
                if name[:2] != "__"
            ]
            if slots and not _is_library(type(x)):
                self._add(_Slot(where, lambda: [getattr(x, name, None) for name in slots], slots))

    def _watch_attributes(self, where: str, x: Any, without: frozenset[str]) -> None:
        self._count(where, "attributes", vars(x))
        self._watch(where, vars(x), tuple(name for name in vars(x) if name not in without))

    def _visit_class(self, kind: type) -> None:
        for cls in kind.__mro__:
            if _is_library(cls) or cls in self._seen:
                continue
            self._seen[cls] = cls
            for value in vars(cls).values():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(function, types.FunctionType):
                    self._visit_function(function)
            self._watch(cls.__name__, vars(cls), tuple(name for name in vars(cls) if name[:2] != "__"))

    def _visit_function(self, f: types.FunctionType) -> None:
        self._seen[id(f)] = f
        where, cells = f.__qualname__, f.__closure__ or ()
        if cells:
            self._add(_Slot(where, lambda: [_content(cell) for cell in cells], f.__code__.co_freevars))
        if _is_library(f):
            return
        parts = ("__code__", "__defaults__", "__kwdefaults__", *vars(f))
        self._add(_Slot(where, lambda: [getattr(f, name, None) for name in parts], parts))
        self._count(where, "attributes", vars(f))
        names = frozenset(_names_in(f.__code__))
        self._code |= names
        for name in names:  # imported inside, perhaps
            if name in sys.modules and name not in f.__globals__:
                self._visit(name, sys.modules[name])
        here = tuple(sorted(names & f.__globals__.keys()))
        if (f.__module__, here) not in self._seen:
            self._seen[f.__module__, here] = f
            self._watch(str(f.__module__), f.__globals__, here)

    def _watch(self, where: str, entries: Mapping[str, Any], names: tuple) -> None:
        """Watches entries of a mapping, of which some may not be there."""
        if len(names) > 1 and all(name in entries for name in names):
            self._add(_Slot(where, partial(operator.itemgetter(*names), entries), names))  # many times faster
        elif names:
            self._add(_Slot(where, lambda: [entries.get(name) for name in names], names))

    def _count(self, where: str, name: str, entries: Mapping) -> None:
        """Watches how many entries a mapping has."""
        self._counted.append(entries)
        self._counted_names.append(f"the number of {name} of {where}")

    def _add(self, slot: "_Slot") -> None:
        if len(self._slots) == _MOST:
            raise Untraceable(f"more than {_MOST:,} objects can be reached, too many to watch for changes")
        self._slots.append(slot)
        for name, value in zip(slot.names, slot.saved, strict=True):
            if not isinstance(value, ATOMS):
                self._visit(slot.place(name), value)

    def _skipped(self, x: Any) -> frozenset[str]:
        return next((names for kind, names in self.skip.items() if isinstance(x, kind)), frozenset())


class _Slot:
    """Values that were read from one place, and how to read them again."""

    def __init__(self, where: str, read: Callable[[], Iterable], names: Sequence):
        self.where, self.read, self.names = where, read, names
        self.saved = tuple(read())

    def failure_reason(self) -> str | None:
        """Returns what is no longer as it was; None if all is."""
        try:
            values = self.read()
        except KeyError as error:
            return f"{self.place(error.args[0])} is no longer there"
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
        if not self.where:
            return name
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
        return same(old, new)
    return isinstance(old, (list, dict, set)) and not old and not new


def same(old: Sequence, new: Sequence) -> bool:
    """Returns whether values may stand for others, one by one."""
    return len(old) == len(new) and all(map(_alike, old, new))


def _is_library(x: Any) -> bool:
    return str(x.__module__).partition(".")[0] in _LIBRARIES


def _names_in(code: types.CodeType) -> Iterable[str]:
    """Returns the names that code and the functions inside it look up, or may look up by getattr."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _as_tuple(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
