"""The arguments of models and guides: which of them hold rows of the data, and how rows are taken.

Data may be tensors, NumPy arrays and memory maps, sparse matrices of scipy, :class:`~pyrovae.rows.Rows` of these,
anything with ``to_numpy`` (a column or a table of pandas), lists and tuples, packed sequences, and dicts, lists and
tuples of these. Whatever has an entry per datum is cut along with the others. Numbers, strings, ``None``, functions,
tensors without dimensions and other objects are for all data and are passed on unchanged.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import register_pytree_node, tree_leaves
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from pyrovae.rows import NumberType, Rows, is_sparse

__all__ = ["Arguments"]

_ROWS = 1000  # batch size of the loader of a data set
_NARROW = frozenset([torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int16, torch.int32])


class Arguments:
    """Positional and keyword arguments of a model and a guide: a batch, or data in memory.

    It gives data to :func:`pyrovae.fit` as keyword arguments, and may be returned by a loader's ``collate_fn`` or by a
    ``transform``.

    Args:
        *args: positional arguments.
        **kwargs: keyword arguments.

    >>> batch = Arguments(torch.zeros(2, 3), mask=torch.ones(2, 3))
    >>> len(batch.args), list(batch.kwargs)
    (1, ['mask'])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    def pin_memory(self) -> "Arguments":
        """Returns the same with tensors in pinned memory; a ``DataLoader`` calls it."""
        args, kwargs = tree_map(lambda t: t.pin_memory(), (self.args, self.kwargs))
        return Arguments(*args, **kwargs)


class _EntryList(list):
    """A list with an entry per datum."""


class _EntryTuple(tuple):
    """A tuple with an entry per datum."""


class _MemberList(list):
    """A list of several members, each with an entry per datum."""


class _MemberTuple(tuple):
    """A tuple of several members, each with an entry per datum."""


_Entries = _EntryList | _EntryTuple
_Members = _MemberList | _MemberTuple


def _register(kind: type) -> None:
    register_pytree_node(kind, lambda x: (list(x), None), lambda items, _: kind(items))


# Types of their own, registered with pytree, so that a subset of the rows is not classified again, and otherwise.
for _kind in (_EntryList, _EntryTuple, _MemberList, _MemberTuple):
    _register(_kind)


def as_arguments(batch: Any) -> Arguments:
    """Returns a batch of a loader as arguments: items of tuples and lists are positional, all else is one argument."""
    if isinstance(batch, Arguments):
        return batch
    if isinstance(batch, (tuple, list)) and not isinstance(batch, (PackedSequence, _Entries)):
        return Arguments(*batch)
    return Arguments(batch)


def _named(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns all arguments with their names in messages."""
    return [*((f"argument {i + 1}", value) for i, value in enumerate(args)), *kwargs.items()]


def count_data(args: tuple, kwargs: dict[str, Any]) -> int:
    """Returns the number of data: rows of the first tensor, array or packed sequence, else entries of the first list.

    Raises:
        ValueError: when the arguments do not show it.
    """
    if args and isinstance(args[0], Tensor) and args[0].dim() > 0:
        return len(args[0])
    return _first_size(_named(args, kwargs))[1]


def _first_size(arguments: list[tuple[str, Any]]) -> tuple[str, int]:
    """Returns the name of the first argument that shows the number of data, and the number."""
    undecided = []
    for name, value in _leaves(arguments):
        size = _size(value)
        if size is not None:
            return name, size
        if isinstance(value, (list, tuple)):
            undecided.append((name, value))
    for name, value in undecided:
        if not value:
            continue
        sizes = [[size for _, x in _leaves([("", entry)]) if (size := _size(x)) is not None] for entry in value]
        known = {size[0] for size in sizes if size}
        if len(known) != 1 or known == {len(value)}:  # numbers and words, or sequences of different lengths
            return name, len(value)
        (size,) = known
        if [] in sizes:
            return name, size
        raise ValueError(
            f"{name} is a {kind_of(value)} of {len(value)} with {size} rows each: are these {len(value)} data, or "
            f"{size}? For {len(value)}, add a tensor with an entry per datum; for {size}, give a dict, or one argument "
            "for each."
        )
    raise ValueError(
        "there is no tensor, array or list among the arguments: give at least one, with an entry per datum along its "
        "first dimension."
    )


def canonicalize(
    args: tuple, kwargs: dict[str, Any], numbers: NumberType | None = None
) -> tuple[tuple, dict[str, Any], int]:
    """Returns arguments with arrays as :class:`Rows` and lists marked as entries or members, and the number of data.

    Raises:
        ValueError: when an argument has rows or entries, but not one per datum, or is ambiguous.
    """
    args, kwargs = as_rows(args, kwargs, numbers)
    arguments = _named(args, kwargs)
    first, size = _first_size(arguments)
    if size == 0:
        raise ValueError(f"{first} is empty{_shape(dict(_leaves(arguments)).get(first))}. Give at least one datum.")
    marked = [_marked(name, value, first, size) for name, value in arguments]
    return tuple(marked[: len(args)]), dict(zip(kwargs, marked[len(args) :], strict=True)), size


def as_rows(args: tuple, kwargs: dict[str, Any], numbers: NumberType | None = None) -> tuple[tuple, dict[str, Any]]:
    """Returns arguments with arrays, and objects with ``to_numpy``, as :class:`Rows`, which convert them by batches.

    Floating-point numbers get the type that a VAE takes; else that of the first floating-point tensor, of the modules
    of model and guide, or the default of torch. Integers of arrays become int64, because arithmetic with bytes wraps,
    but for the data of a VAE, the first argument, which become floating-point numbers. Tensors are converted for a VAE
    alone. Arrays of strings and objects stay arrays. Sparse matrices are treated as arrays. Those that
    :class:`Arguments` hold take its place.

    Raises:
        ValueError: when there are other positional arguments beside `Arguments`.
    """
    if any(isinstance(x, Arguments) for x in args):
        if len(args) != 1:
            raise ValueError("pyrovae.Arguments holds all positional arguments: give no other.")
        args, kwargs = args[0].args, args[0].kwargs | kwargs
    numbers = numbers or NumberType()
    if not numbers.converts and not kwargs and all(isinstance(x, Tensor) for x in args):
        return args, kwargs
    dtype = numbers.dtype if numbers.converts else None
    for leaf in tree_leaves((args, kwargs)) if dtype is None else ():
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            dtype = leaf.dtype
            break
    dtype = dtype or numbers.dtype or torch.get_default_dtype()

    def convert(x: Any, is_data: bool = False) -> Any:
        if not isinstance(x, (np.ndarray, Tensor, Rows)) and hasattr(x, "to_numpy"):
            x = x.to_numpy()
        if isinstance(x, Tensor):
            changes = numbers.converts and x.dtype != dtype and (x.is_floating_point() or is_data)
            return Rows(x, dtype) if changes and x.dim() > 0 and not x.is_complex() else x
        if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
            if x.ndim == 0:
                return Rows(x[None], dtype if x.dtype.kind == "f" else None)[0]
            x = Rows(x)
        if is_sparse(x):
            x = Rows(x)
        if isinstance(x, Rows) and x.dtype in _NARROW:
            x = x.astype(torch.int64)
        if not isinstance(x, Rows) or not (x.dtype.is_floating_point or is_data and numbers.converts):
            return x
        return x.astype(dtype)

    return (
        tuple(convert(x, is_data=i == 0) if _is_leaf(x) else tree_map(convert, x) for i, x in enumerate(args)),
        {
            name: convert(x, is_data=not args and name == "x") if _is_leaf(x) else tree_map(convert, x)
            for name, x in kwargs.items()
        },
    )


def as_tensors(args: tuple, kwargs: dict[str, Any], numbers: NumberType | None = None) -> tuple[tuple, dict[str, Any]]:
    """Returns what :func:`as_rows` returns, with all rows as tensors."""
    args, kwargs = as_rows(args, kwargs, numbers)
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return args, kwargs
    return tree_map(lambda x: x[:] if isinstance(x, Rows) else x, (args, kwargs))


def take(value: Any, rows: slice | Tensor) -> Any:
    """Returns some rows of a canonical argument: of a tensor, or of each member of a container."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value
        return value[rows] if isinstance(rows, slice) else value.index_select(0, rows.to(value.device))
    if isinstance(value, Rows):
        return value[rows]
    if isinstance(value, np.ndarray):
        return value if value.ndim == 0 else value[rows if isinstance(rows, slice) else rows.cpu().numpy()]
    if isinstance(value, PackedSequence):
        return _of_packed(value, rows)
    if isinstance(value, _Entries):
        return type(value)(value[rows] if isinstance(rows, slice) else [value[i] for i in rows.tolist()])
    return _map_items(value, lambda x: take(x, rows))


def take_rows(rows: slice | Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns canonical arguments for some of the data."""
    return tuple(take(x, rows) for x in args), {name: take(x, rows) for name, x in kwargs.items()}


def as_device(device: torch.device | str | None) -> torch.device | None:
    """Returns a device.

    Raises:
        ValueError: when there is no device of this name.

    >>> as_device("cpu")
    device(type='cpu')
    """
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be "cpu", "cuda", "cuda:1" or the like, got {device!r}.') from None


def to_device(args: tuple, kwargs: dict[str, Any], device: torch.device | str) -> tuple[tuple, dict[str, Any]]:
    """Returns arguments with their tensors on a device."""

    def move(t: Any) -> Any:
        if isinstance(t, PackedSequence):
            return t.to(device, non_blocking=True)  # type: ignore[arg-type]  # torch declares one signature of three
        if isinstance(t, Rows):
            return t.to(device)
        return t.to(device, non_blocking=True) if isinstance(t, Tensor) else t

    return tree_map(move, (args, kwargs))


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns all tensors in arguments."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return list(args)
    tensors: list[Tensor] = []
    tree_map(lambda x: tensors.extend(t for t in tree_leaves(x) if isinstance(t, Tensor)), (args, kwargs))
    return tensors


def device_of(args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """Returns the device of the first tensor in arguments; the CPU if there is none."""
    rows: list[Rows] = []
    tree_map(lambda x: rows.append(x) if isinstance(x, Rows) else None, (args, kwargs))
    tensors = [*tensors_of(args, kwargs), *(x.source for x in rows if isinstance(x.source, Tensor))]
    return tensors[0].device if tensors else torch.device("cpu")


def cuda_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Returns the GPUs that hold some tensors, for ``torch.random.fork_rng``."""
    return sorted({t.device for t in tensors if t.is_cuda}, key=str)


def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Returns a gradient with the strides of its parameter, as autograd accumulates it.

    Fused optimizers go through the memory of both in one order, and on a CPU without a check.
    """
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def holds_packed(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Returns whether there is a packed sequence in arguments."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return False
    packed: list[bool] = []
    tree_map(lambda x: packed.append(isinstance(x, PackedSequence)), (args, kwargs))
    return any(packed)


def named_tensors(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Returns all tensors in arguments with their names in messages."""
    leaves = _leaves(_named(args, kwargs))
    return [(name, t) for name, value in leaves for t in tree_leaves(value) if isinstance(t, Tensor)]


def named_arrays(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Tensor | Rows]]:
    """Returns all tensors and rows of arrays in arguments with their names in messages."""
    leaves = _leaves(_named(args, kwargs))
    return [(name, x) for name, value in leaves for x in tree_leaves(value) if isinstance(x, (Tensor, Rows))]


def elements_per_datum(args: tuple, kwargs: dict[str, Any], size: int) -> float:
    """Returns the elements per datum of the largest tensor of `size` data, at least 1."""
    return max(1.0, max((math.prod(x.shape) for _, x in named_arrays(args, kwargs)), default=0) / size)


def tree_map(function: Callable, value: Any) -> Any:
    """Applies a function to each leaf of arguments in nested containers, and returns the same containers."""
    if _is_leaf(value):
        return function(value)
    if isinstance(value, (Mapping, _Members)) or _is_namedtuple(value):
        return _map_items(value, lambda x: tree_map(function, x))
    return type(value)(tree_map(function, x) for x in value)


def as_loader(args: tuple, kwargs: dict[str, Any]) -> DataLoader | None:
    """Returns the loader among arguments, or a loader of the data set among them; None without one.

    Raises:
        ValueError: when the loader draws the data in a random order.
        TypeError: when there are other positional arguments.
    """
    is_alone = len(args) == 1 and is_map_style(args[0])
    if not is_alone and not any(isinstance(x, (DataLoader, Dataset)) for x in (*args, *kwargs.values())):
        return None
    if not is_alone and (len(args) != 1 or not isinstance(args[0], (DataLoader, Dataset))):
        raise TypeError(
            "a DataLoader or a Dataset must hold all rows of the data: give no other argument, but for keyword "
            "arguments that are for all data."
        )
    loader = args[0] if isinstance(args[0], DataLoader) else DataLoader(args[0], _ROWS)
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    for sampler in samplers:
        shuffled = isinstance(sampler, DistributedSampler) and (sampler.shuffle or sampler.num_replicas > 1)
        if shuffled or isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            raise ValueError(
                f"the DataLoader draws data by a {type(sampler).__name__}, but results are returned in the order of "
                "the data. Give one with shuffle=False."
            )
    return loader


def in_memory(
    args: tuple, kwargs: dict[str, Any], numbers: NumberType | None = None
) -> tuple[tuple, dict[str, Any], int]:
    """Returns canonical arguments and the number of data; a loader's batches are joined in memory."""
    loader = as_loader(args, kwargs)
    if loader is None:
        return canonicalize(args, kwargs, numbers)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed even if it does not need one
        batches = [canonicalize(batch.args, batch.kwargs | kwargs, numbers)[:2] for batch in map(as_arguments, loader)]
    if not batches:
        raise ValueError("there is no batch of data. Give at least one datum, and do not drop the last batch.")
    joined = _joined([dict(enumerate(args)) | keywords for args, keywords in batches])
    positions = range(len(batches[0][0]))
    keywords = {name: x for name, x in joined.items() if name not in positions}
    return canonicalize(tuple(joined[i] for i in positions), keywords)


def is_map_style(data: Any) -> bool:
    """Returns whether something is a data set of another library than torch: it has a length and items by number."""
    kinds = (Tensor, np.ndarray, np.generic, Rows, Arguments, DataLoader, Mapping, list, tuple, str, bytes, range)
    return not isinstance(data, (*kinds, type)) and all(
        hasattr(data, name) for name in ("__len__", "__getitem__", "__getitems__")
    )


_positions: ContextVar[int | Tensor | None] = ContextVar("positions", default=None)


@contextmanager
def row_positions(rows: int | Tensor | None) -> Iterator[None]:
    """Sets the positions in the data of the rows of a batch, for messages: that of the first row, or of each."""
    token = _positions.set(rows)
    try:
        yield
    finally:
        _positions.reset(token)


def row_name(row: int) -> str:
    """Returns the name of a row of a batch in messages, by its position in the data if that is known."""
    rows = _positions.get()
    if isinstance(rows, Tensor):
        rows, row = (0, int(rows[row])) if row < len(rows) else (None, row)
    return f"row {row} of the batch" if rows is None else f"row {rows + row} of the data"


@contextmanager
def explain_type_errors(args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Raises a TypeError with advice where the type or dtype of an argument is the cause of an error."""
    try:
        yield
    except TypeError as error:
        hints = {
            "positional argument": "Give rows as one tensor: a list or a tuple holds an argument each. Give keyword "
            "arguments as pyrovae.Arguments(x, mask=mask), a dict of them as Arguments(**batch)",
            "not dict": "A dict is one argument: give its entries as keyword arguments, pyrovae.Arguments(**batch), "
            "from the data set or the collate_fn of a loader",
            "not _EntryList": "A list is one argument with an entry per datum: give numbers as torch.tensor(x)",
            "not numpy.ndarray": "Arrays of objects or of fields stay as they are: convert them to numbers",
            "expected np.ndarray": "Model and guide get arrays as tensors: torch.as_tensor takes both",
        }
        for cause, hint in hints.items():
            if cause in str(error):
                raise TypeError(f"{error}. {hint}.") from error
        raise
    except RuntimeError as error:
        text = str(error).lower()
        named = named_tensors(args, kwargs)
        whole = [(name, t.dtype) for name, t in named if not (t.is_floating_point() or t.is_complex())]
        if "same dtype" in text and whole:
            name, dtype = whole[0]
            raise TypeError(
                f"{error}: {name} has dtype {str(dtype).removeprefix('torch.')}, and networks compute in floating "
                "point. Convert it, x.float(), in the data or in front of the networks."
            ) from error
        if not ("dtype" in text or "scalar type" in text or "expected" in text) or not (
            "double" in text or "float64" in text
        ):
            raise
        dtypes = {name: t.dtype for name, t in named if t.is_floating_point()}
        doubles = [name for name, dtype in dtypes.items() if dtype == torch.float64]
        if doubles:
            raise TypeError(
                f"{doubles[0]} has dtype float64, but the networks compute in float32: convert it to single precision "
                "by .float(), or the networks to double precision by .double()."
            ) from error
        if not dtypes:
            raise
        name, dtype = next(iter(dtypes.items()))
        raise TypeError(
            f"{name} has dtype {str(dtype).removeprefix('torch.')}, but the networks compute in float64: give it as a "
            "tensor of float64 (torch.from_numpy keeps the dtype of an array), or convert the networks to single "
            "precision by .float()."
        ) from error


def _leaves(arguments: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields the leaves of dicts, named tuples and marked members by name; other lists and tuples are leaves."""
    for name, value in arguments:
        if isinstance(value, Mapping):
            yield from _leaves([(f"{name}[{key!r}]", x) for key, x in value.items()])
        elif isinstance(value, _Members) or _is_namedtuple(value):
            yield from _leaves([(f"{name}[{i}]", x) for i, x in enumerate(value)])
        else:
            yield name, value


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence)


def _is_leaf(value: Any) -> bool:
    # A sparse matrix by a dictionary of keys is a Mapping.
    return not isinstance(value, (Mapping, list, tuple)) or isinstance(value, PackedSequence) or is_sparse(value)


def _size(value: Any) -> int | None:
    """Returns the number of rows of a leaf; None if it has none, or if it is a list or a tuple without a mark."""
    if isinstance(value, Rows):
        return len(value)
    if isinstance(value, Tensor):
        return len(value) if value.dim() > 0 else None
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim > 0 else None
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    return len(value) if isinstance(value, _Entries) else None


def _marked(name: str, value: Any, first: str, size: int) -> Any:
    """Returns a value with its lists marked as entries or members; checks that all leaves have one row per datum."""
    rows = _size(value)
    if rows is not None:
        if rows != size:
            raise ValueError(
                f"{first} has {size} rows but {name} has {rows}: give one row per datum in each. If {name} is for all "
                "data, do not pass it as an argument, but bind it with functools.partial."
            )
        return value
    if isinstance(value, Mapping):
        return _map_items(value, lambda key, x: _marked(f"{name}[{key!r}]", x, first, size), with_keys=True)
    if isinstance(value, _Members) or _is_namedtuple(value):
        parts = iter([_marked(f"{name}[{i}]", x, first, size) for i, x in enumerate(value)])
        return _map_items(value, lambda x: next(parts))
    if not isinstance(value, (list, tuple)) or isinstance(value, PackedSequence) or not value:
        return value
    is_entries, is_members = len(value) == size, _are_members(value, size)
    if is_entries and is_members and size > 1:
        raise ValueError(
            f"{name} is a {kind_of(value)} of {size} with {size} rows each, and there are {size} data: is it an entry "
            "per datum, or several members with a row per datum? For the former, stack it to one tensor; for the "
            "latter, give a dict."
        )
    if is_entries:
        return (_EntryList if isinstance(value, list) else _EntryTuple)(value)
    if is_members:
        members = [_marked(f"{name}[{i}]", x, first, size) for i, x in enumerate(value)]
        return (_MemberList if isinstance(value, list) else _MemberTuple)(members)
    raise ValueError(
        f"{first} has {size} rows but {name} is a {kind_of(value)} of {len(value)}: give an entry per datum. If "
        f"{name} is for all data, do not pass it as an argument, but bind it with functools.partial."
    )


def _are_members(value: Any, size: int) -> bool:
    """Returns whether the members of a list have one row per datum each; those without rows do not count."""
    sizes = []
    for _, x in _leaves([("", x) for x in value]):
        nested = isinstance(x, (list, tuple)) and not isinstance(x, (PackedSequence, _Entries))
        rows = (size if len(x) == size or _are_members(x, size) else len(x)) if nested else _size(x)
        if rows is not None:
            sizes.append(rows)
    return bool(sizes) and all(rows == size for rows in sizes)


def kind_of(value: Any) -> str:
    """Returns the name of a value's type in messages: that of a list, a tuple or a dict for those marked here."""
    return next((kind.__name__ for kind in (list, tuple, dict) if isinstance(value, kind)), type(value).__name__)


def _shape(value: Any) -> str:
    return f": shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray, Rows)) else ""


def _map_items(value: Any, function: Callable, with_keys: bool = False) -> Any:
    """Applies a function to each item of a dict, a named tuple or marked members; returns all else unchanged."""
    if isinstance(value, Mapping):
        items = {key: function(key, x) if with_keys else function(x) for key, x in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        new = copy(value)
        for key, x in items.items():
            new[key] = x
        return new
    if _is_namedtuple(value):
        return type(value)(*map(function, value))
    return type(value)(map(function, value)) if isinstance(value, _Members) else value


def _of_packed(value: PackedSequence, rows: slice | Tensor) -> PackedSequence:
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    if isinstance(rows, slice):
        padded, lengths = padded[rows], lengths[rows]
    else:
        padded, lengths = padded.index_select(0, rows.to(padded.device)), lengths.index_select(0, rows.cpu())
    # A sequence that is sorted by length stays so.
    in_order = value.sorted_indices is None and isinstance(rows, slice)
    return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=in_order)


def _joined(parts: list[Any]) -> Any:
    """Returns the concatenation of several batches."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.dim() > 0 else first
    if isinstance(first, Rows):
        return torch.cat([part[:] for part in parts])
    if isinstance(first, np.ndarray):
        return np.concatenate(parts) if first.ndim > 0 else first
    if isinstance(first, PackedSequence):
        sequences = [x[:n] for part in parts for x, n in zip(*pad_packed_sequence(part, batch_first=True), strict=True)]
        return torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    if isinstance(first, _Entries):
        return type(first)(x for part in parts for x in part)
    if isinstance(first, Mapping):
        return _map_items(first, lambda key, _: _joined([part[key] for part in parts]), with_keys=True)
    if isinstance(first, _Members) or _is_namedtuple(first):
        columns = iter([_joined(list(column)) for column in zip(*parts, strict=True)])
        return _map_items(first, lambda _: next(columns))
    return first
