"""The state that a function can reach, which may change from one call to the next without being an argument."""

import gc
import io
import logging
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from tqdm.std import tqdm

from pyrovae.inference.messages import Untraceable

# Code that reads no state except that of the objects passed to it. All other functions and classes are the user's.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "pyro", "pyrovae", "numpy", "zuko", "torchvision", "tqdm"})
# Values that are compared, not entered.
ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range, slice)
# Objects that are neither compared nor entered.
_OPAQUE = (types.BuiltinFunctionType, types.CodeType, TraceMessenger, Trace, torch.Generator, tqdm, logging.Logger)
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"} | {"built_with"}  # which nothing computes with
_MODULE_ENTRIES = operator.attrgetter("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
_ENTRIES = ("parameters", "buffers", "modules", "pre-hooks", "hooks")
_MAX_SLOTS = 20_000
_MAX_TENSOR_BYTES = 2**26  # a larger one is not set back after a check
_MAX_ARRAY_BYTES = 8192  # larger NumPy arrays are not compared


class Guards:
    """Snapshot of the state that can be reached from some objects, for detecting changes.

    The search follows attributes, elements of containers, closures, the global variables that the code of functions and
    classes names, and parameters in Pyro's store. It does not enter the code of well-known libraries, which reads only
    what is passed to it. The values of tensors are not part of the snapshot: a graph takes them as inputs.

    Args:
        roots: the objects.
        params: names of parameters in Pyro's store.
        skip: by class, the names of attributes to leave out.

    Raises:
        Untraceable: when there are too many objects, one is an iterator or a file, or a parameter has a hook that no
            graph can call.

    >>> layer = nn.Dropout(0.5)
    >>> guards = Guards((layer,))
    >>> guards.failure_reason((layer,))
    >>> _ = layer.eval()
    >>> guards.failure_reason((layer,))
    'Dropout.training changed from True to False'
    """

    def __init__(
        self, roots: tuple, params: Sequence[str] = (), skip: Mapping[type, frozenset[str]] = types.MappingProxyType({})
    ):
        self.roots, self.params, self.skip = roots, tuple(params), skip
        self.tensors: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._names: list[str] = []  # of the tensors
        self._slots: list[_Slot] = []
        self._counted: list[Mapping] = []
        self._counted_names: list[str] = []
        self._seen: dict[Any, Any] = {}  # keeps the objects alive, so that no other object takes their id
        self._code_names: set[str] = set()  # names that the code of any function looks up
        self._modules: list[types.ModuleType] = []
        self.sequences: list[list | deque] = []
        if params:
            store = pyro.get_param_store()
            self._add(_Slot("pyro.param", lambda: [store._params.get(name) for name in self.params], self.params))
        for root in roots:
            self._visit(getattr(root, "__qualname__", type(root).__name__), root)
        for module in self._modules:  # the list grows during the loop
            self._watch(module.__name__, vars(module), tuple(sorted(self._code_names & vars(module).keys())))
        self.positions = {id(t): -i for i, t in enumerate(self.tensors, start=1)}
        self._metadata = [tensor_metadata(t) for t in self.tensors]
        self.leaves = [t for t in self.tensors if t.requires_grad and t.is_leaf]
        if any(t._post_accumulate_grad_hooks for t in self.leaves):
            raise Untraceable("a parameter has a post-accumulate-grad hook, which a graph cannot call")
        hooks = [f"the number of gradient hooks of parameter {i}" for i in range(len(self.leaves))]
        self._add(_Slot("", self._counts, [*self._counted_names, *hooks]))
        self._saved = [value for slot in self._slots for value in slot.saved]
        names: dict[str, Any] = {}
        self._read = _function(", ".join(slot.source(names) for slot in self._slots), names)
        names = {f"t{i}": t for i, t in enumerate(self.tensors)}
        properties = ("shape", "stride()", "dtype", "device", "requires_grad")
        self._read_metadata = _function(", ".join(f"{t}.{name}" for t in names for name in properties), names)
        self._saved_metadata = self._read_metadata()

    def failure_reason(self, roots: tuple) -> str | None:
        """Returns what changed since the snapshot, for a message; None if nothing did."""
        if not _is_unchanged(self.roots, roots):
            return "the model, the guide or an argument is a different object"
        if not self._is_identical():
            for slot in self._slots:
                change = slot.failure_reason()
                if change is not None:
                    return change
        if self._read_metadata() != self._saved_metadata:
            for name, metadata, t in zip(self._names, self._metadata, self.tensors, strict=True):
                if tensor_metadata(t) != metadata:
                    return f"{name} changed its shape, type, device or requires_grad"
        return None

    def _is_identical(self) -> bool:
        """Returns whether all values are the same objects. This fast test passes in nearly all steps.

        The values of all slots are compared as one list. A value that moved from the end of one container to the start
        of the next leaves that list as it was, but changes the numbers of entries, which are values too.
        """
        try:
            values = self._read()
        except KeyError:
            return False
        return len(values) == len(self._saved) and all(map(operator.is_, values, self._saved))

    @cached_property
    def fingerprint(self) -> tuple:
        """Hashable value, equal for two snapshots that differ only in their tensors."""
        return tuple((slot.where, *map(_key, slot.saved)) for slot in self._slots)

    # The search: one method for each kind of object; _VISITORS below says which.

    def _visit(self, where: str, x: Any) -> None:
        if isinstance(x, (*ATOMS, *_OPAQUE)) or id(x) in self._seen:
            return
        self._seen[id(x)] = x
        visit = next(visit for kind, visit in _VISITORS if isinstance(x, kind))
        visit(self, where, x)

    def _visit_tensor(self, where: str, x: Tensor) -> None:
        self.tensors.append(x)
        self._names.append(where)

    def _visit_class(self, where: str, x: type) -> None:
        for cls in x.__mro__:
            if _is_library(cls) or cls in self._seen:
                continue
            self._seen[cls] = cls
            for value in vars(cls).values():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(function, types.FunctionType):
                    self._visit_function(function.__qualname__, function)
            names = tuple(name for name in vars(cls) if name[:2] != "__")
            self._watch(cls.__name__, vars(cls), names, partial(setattr, cls))

    def _visit_python_module(self, where: str, x: types.ModuleType) -> None:
        if x.__name__.partition(".")[0] not in _LIBRARIES:
            self._modules.append(x)

    def _visit_method(self, where: str, x: types.MethodType) -> None:
        self._visit(type(x.__self__).__name__, x.__self__)
        self._visit(where, x.__func__)

    def _visit_function(self, where: str, f: types.FunctionType) -> None:
        self._seen[id(f)] = f
        where, cells = f.__qualname__, f.__closure__ or ()
        if cells:
            named = dict(zip(f.__code__.co_freevars, cells, strict=True))

            def write(name: str, value: Any) -> None:
                named[name].cell_contents = value

            self._add(_Slot(where, lambda: [_content(cell) for cell in cells], f.__code__.co_freevars, write=write))
        if _is_library(f):
            return
        parts = ("__code__", "__defaults__", "__kwdefaults__", *vars(f))
        self._add(_Slot(where, lambda: [getattr(f, name, None) for name in parts], parts))
        self._count(where, "attributes", vars(f))
        names = frozenset(_names_in(f.__code__))
        self._code_names |= names
        for name in names:  # a module may be imported inside of the function
            if name in sys.modules and name not in f.__globals__:
                self._visit(name, sys.modules[name])
        used_globals = tuple(sorted(names & f.__globals__.keys()))
        if (f.__module__, used_globals) not in self._seen:
            self._seen[f.__module__, used_globals] = f
            self._watch(str(f.__module__), f.__globals__, used_globals)

    def _visit_lru_cache(self, where: str, x: Any) -> None:
        # The cached results are read; results for other arguments are computed.
        for referent in gc.get_referents(x):
            for result in referent.values() if isinstance(referent, dict) else [referent]:
                self._visit(where, result)

    def _visit_partial(self, where: str, x: partial) -> None:
        self._visit(where, [x.func, x.args, x.keywords])

    def _visit_dict(self, where: str, x: dict) -> None:
        self._add(_Slot(where, lambda: x, [f"the key {key!r}" for key in x]))
        self._watch(where, x, tuple(x))
        self._count(where, "entries", x)

    def _visit_container(self, where: str, x: Any) -> None:
        self._add(_Slot(where, lambda: x, range(len(x))))
        self._count(where, "entries", x)
        if isinstance(x, (list, deque)):
            self.sequences.append(x)

    def _visit_array(self, where: str, x: np.ndarray) -> None:
        if x.nbytes <= _MAX_ARRAY_BYTES:
            self._add(_Slot(where, lambda: [x.tobytes()], ["content"]))

    def _visit_module(self, where: str, x: nn.Module) -> None:
        where = type(x).__name__
        self._visit_class(where, type(x))
        self._watch_attributes(where, x, _MODULE_INTERNALS | self._skipped(x))
        for name, entries in zip(_ENTRIES, _MODULE_ENTRIES(x), strict=True):
            self._watch(where, entries, tuple(entries))
            self._count(where, name, entries)
        self.buffers += [b for b in x._buffers.values() if b is not None]

    def _visit_object(self, where: str, x: Any) -> None:
        if isinstance(x, (Iterator, io.IOBase)) and _is_library(type(x)):
            raise Untraceable(f"it can reach {where}, a {type(x).__name__}: no guard sees where it stands")
        self._visit_class(where, type(x))
        if hasattr(x, "__dict__"):
            self._watch_attributes(where, x, self._skipped(x))
        slots = [
            name for cls in type(x).__mro__ for name in _as_tuple(vars(cls).get("__slots__", ())) if name[:2] != "__"
        ]
        if slots and not _is_library(type(x)):
            self._add(
                _Slot(where, lambda: [getattr(x, name, None) for name in slots], slots, write=partial(setattr, x))
            )

    def _watch_attributes(self, where: str, x: Any, skipped: frozenset[str]) -> None:
        self._count(where, "attributes", vars(x))
        self._watch(where, vars(x), tuple(name for name in vars(x) if name not in skipped))

    def _skipped(self, x: Any) -> frozenset[str]:
        return next((names for kind, names in self.skip.items() if isinstance(x, kind)), frozenset())

    def _watch(
        self, where: str, entries: Mapping, names: tuple, write: Callable[[Any, Any], None] | None = None
    ) -> None:
        """Watches entries of a mapping, some of which may be absent."""
        if names and all(name in entries for name in names):
            write = write or (entries.__setitem__ if isinstance(entries, dict) else None)
            self._add(_Slot(where, lambda: [entries[name] for name in names], names, entries, write))
        elif names:
            self._add(_Slot(where, lambda: [entries.get(name) for name in names], names))

    def _count(self, where: str, name: str, entries: Mapping) -> None:
        """Watches the number of entries of a mapping."""
        self._counted.append(entries)
        self._counted_names.append(f"the number of {name} of {where}")

    def _counts(self) -> list[int]:
        return [*map(len, self._counted), *(len(t._backward_hooks or ()) for t in self.leaves)]

    def _add(self, slot: "_Slot") -> None:
        if len(self._slots) == _MAX_SLOTS:
            raise Untraceable(f"more than {_MAX_SLOTS:,} objects can be reached, too many to watch for changes")
        self._slots.append(slot)
        for name, value in zip(slot.names, slot.saved, strict=True):
            if not isinstance(value, ATOMS):
                self._visit(slot.place(name), value)


class Snapshot:
    """What a run of model and guide for a check may change, and a training step must not find changed.

    These are numbers (counters of calls), the states of random generators, and buffers and other tensors that are not
    parameters, whether they were changed in place or replaced: attributes, global variables, entries of dicts, and
    lists of nothing else. What the first run creates, such as parameters, is kept.

    Args:
        roots: the model and the guide.
    """

    def __init__(self, roots: tuple):
        self.states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.of_devices: dict[torch.device, Tensor] = {}
        self.values: list[tuple[_Slot, dict[Any, Any]]] = []  # a place and what is there, by name
        self.sequences: list[tuple[list | deque, list]] = []  # a list and its items
        self.tensors: list[tuple[Tensor, int, Tensor]] = []  # a tensor, its version and its content
        self.generators: list[tuple[Any, Any]] = []
        try:
            guards = Guards(roots)
        except (Untraceable, RuntimeError, ValueError):  # an iterator, a lazy module, too many objects: not set back
            return
        for slot in guards._slots:
            generators = [x for x in slot.saved if isinstance(x, (torch.Generator, np.random.Generator))]
            self.generators += [(x, _state_of(x)) for x in generators]
            values = {name: x for name, x in zip(slot.names, slot.saved, strict=True) if _is_state(x)}
            if values and slot.write is not None:
                self.values.append((slot, values))
        self.sequences = [(x, [*x]) for x in guards.sequences if all(map(_is_state, x))]
        self.of_devices = {t.device: torch.cuda.get_rng_state(t.device) for t in guards.tensors if t.is_cuda}
        for t in guards.tensors:
            if _is_plain_tensor(t) and t.nbytes <= _MAX_TENSOR_BYTES:
                self.tensors.append((t, t._version, t.clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Sets back what changed since."""
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])
        for device, cuda_state in self.of_devices.items():
            torch.cuda.set_rng_state(cuda_state, device)
        for slot, values in self.values:
            assert slot.write is not None
            try:
                found = dict(zip(slot.names, slot.read(), strict=True))
            except (KeyError, ValueError):  # something is no longer there
                continue
            for name, value in values.items():
                now = found[name]
                if now is not value and (_is_number(now) if _is_number(value) else _is_plain_tensor(now)):
                    slot.write(name, value)
        for x, items in self.sequences:
            is_same = len(x) == len(items) and all(map(operator.is_, x, items))
            if not is_same and all(map(_is_state, x)):
                x.clear()
                x.extend(items)
        for t, version, content in self.tensors:
            if t._version != version:
                t.copy_(content)
        for generator, state in self.generators:
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            else:
                generator.bit_generator.state = state


def _is_number(x: Any) -> bool:
    return type(x) in (int, float)


def _is_plain_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.requires_grad and not isinstance(x, nn.Parameter)


def _is_state(x: Any) -> bool:
    return _is_number(x) or _is_plain_tensor(x)


def _state_of(generator: Any) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.bit_generator.state


def _key(x: Any) -> Any:
    """Returns a hashable value for an atom, and the class of any other object."""
    if isinstance(x, slice):  # without a hash before Python 3.12
        return slice, _key(x.start), _key(x.stop), _key(x.step)
    return x if isinstance(x, ATOMS) else type(x)


# The first row whose class an object is an instance of decides.
_VISITORS: tuple[tuple[Any, Callable[[Guards, str, Any], None]], ...] = (
    (Tensor, Guards._visit_tensor),
    (type, Guards._visit_class),
    (types.ModuleType, Guards._visit_python_module),
    (types.MethodType, Guards._visit_method),
    (types.FunctionType, Guards._visit_function),
    (type(lru_cache(int)), Guards._visit_lru_cache),
    (partial, Guards._visit_partial),
    (dict, Guards._visit_dict),
    ((list, tuple, set, frozenset, deque), Guards._visit_container),
    (np.ndarray, Guards._visit_array),
    (nn.Module, Guards._visit_module),
    (object, Guards._visit_object),
)


class _Slot:
    """Values that were read from one place, and the function that reads them again.

    Args:
        where: the place.
        read: reads the values.
        names: of the values.
        entries: the mapping that holds them under these names, where there is one: it is read much faster.
        write: writes a value under its name, where that is possible.
    """

    def __init__(
        self,
        where: str,
        read: Callable[[], Any],
        names: Sequence,
        entries: Mapping | None = None,
        write: Callable[[Any, Any], None] | None = None,
    ):
        self.where, self.read, self.names, self.entries, self.write = where, read, names, entries, write
        self.saved = tuple(read())

    def source(self, names: dict[str, Any]) -> str:
        """Returns source that reads the values, separated by commas; adds what it names to `names`."""
        name = f"x{len(names)}"
        if self.entries is None or not all(type(key) is str for key in self.names):
            names[name] = self.read
            return f"*{name}()"
        names[name] = self.entries
        return ", ".join(f"{name}[{key!r}]" for key in self.names)

    def failure_reason(self) -> str | None:
        """Returns what changed; None if nothing did."""
        try:
            values = self.read()
        except KeyError as error:
            return f"{self.place(error.args[0])} is no longer there"
        if len(values) != len(self.saved):
            return f"{self.where} has {len(values)} entries, and had {len(self.saved)}"
        if all(map(operator.is_, values, self.saved)):
            return None
        for name, old, new in zip(self.names, self.saved, values, strict=True):
            if not _is_unchanged(old, new):
                are_atoms = isinstance(old, ATOMS) and isinstance(new, ATOMS)
                return f"{self.place(name)} changed" + (f" from {old!r} to {new!r}" if are_atoms else "")
        return None

    def place(self, name: Any) -> str:
        if not self.where:
            return name
        return f"{self.where}.{name}" if isinstance(name, str) else f"{self.where}[{name!r}]"


def _function(items: str, names: dict[str, Any]) -> Callable[[], tuple]:
    """Returns a function that computes a tuple from source, which is much faster than a loop over its items."""
    return eval(f"lambda: ({items}{',' if items else ''})", names)


def tensor_metadata(t: Tensor) -> tuple:
    """Returns the properties of a tensor that a graph is specialised to."""
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad


def all_unchanged(old: Sequence, new: Sequence) -> bool:
    """Returns whether each value is the same object as before, or an equal atom."""
    return len(old) == len(new) and all(map(_is_unchanged, old, new))


def _is_unchanged(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, ATOMS):
        return old == new or (old != old and new != new)  # NaN
    if isinstance(old, types.MethodType):
        return old == new
    if isinstance(old, tuple):
        return all_unchanged(old, new)
    return isinstance(old, (list, dict, set)) and not old and not new


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
    except ValueError:  # empty
        return None
